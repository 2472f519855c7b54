"""One file a question; each runs as `python -m benchmarks.NAME`, prints a table and, with `--json FILE`, writes JSON.

Timings live here and never in tests. Results that the README or docs quote are committed under `benchmarks/results/`.
"""
