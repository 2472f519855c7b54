"""Text in, token shards out, batches out.

`sources` reads documents from anywhere, `embedded` makes them up, `clean` normalises and identifies them, `prepare`
turns them into verified folders of token shards (`shards` writes those), and `loader` turns shards into batches.
"""
