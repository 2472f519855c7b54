"""What a run did, for people to see: metrics, progress line, trackers, report. It sees the run and never steers it.

Nothing here feeds back into training: a tracker that fails, a card that is not in the table or a page that is never
opened changes no step. All of it reads `metrics.jsonl`, the one record of a run (see `observe/metrics.py`).
"""
