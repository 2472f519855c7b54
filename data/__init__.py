"""Text in, token shards out, batches out.

`sources` reads documents from anywhere, `embedded` makes them up, `prepare` turns them, in the stages of `preparation`,
into verified folders of token shards (`shards` writes those), and `loader` turns shards into batches.
"""
