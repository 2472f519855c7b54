"""Learning from a larger teacher: problems -> traces (generate) -> dataset (filter) -> scores, for phases of a run."""
