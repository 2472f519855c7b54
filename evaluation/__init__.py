"""Is the model any good? Probes and metrics on held-out data, and what counts as a correct answer."""
