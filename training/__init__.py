"""The loop: a run is a list of phases, a phase a list of steps, and there is one train step."""
