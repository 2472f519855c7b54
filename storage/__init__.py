"""Folders on disk that are whole or absent: atomic, hashed, verified.

Token shards, checkpoints, tokenizers and later trace chunks and exports are all written through `storage.folder`.
This room knows nothing of torch or of what the files mean.
"""
