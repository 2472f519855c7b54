"""The third stage of preparation: the documents of one piece -> their tokens, in a folder of their own.

By any number of processes at once; `data/shards.py` joins the pieces to shards.
"""

import functools
import json
from pathlib import Path

from data import shards
from data.preparation.read_pieces import batches
from data.preparation.select_documents import kept
from storage import folder
from tokenizer import Tokenizer


def write_tokens(table: Path, answers: bytes, tokenizer: Path, path: Path) -> None:
    """Write the documents of a table that stay as one shard a side to the folder `path`, unless that is done."""
    if path.exists():
        if not folder.verify(path):
            return
        folder.remove(path)
    encoder = _tokenizer(tokenizer)
    dtype = shards.token_dtype(encoder.vocab_size)
    with folder.write(path) as temporary:
        writers = {split: shards.SplitWriter(temporary, split, dtype, encoder.end_of_text) for split in shards.SPLITS}
        for batch in batches(kept(table, answers), lambda document: document[1]):
            for (side, text), tokens in zip(batch, encoder.encode_batch([text for _, text in batch]), strict=True):
                writers[side].write(text, tokens)
        counts = {split: writer.close() for split, writer in writers.items()}
        (temporary / shards.DESCRIPTION).write_text(json.dumps({"splits": counts}), encoding="utf-8")


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
