"""The third stage of preparation: the documents of one piece -> their tokens, in a folder of their own.

By any number of processes at once; `data/shards.py` joins the pieces to shards.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from data import shards
from data.select_documents import kept
from storage import folder
from tokenizer import Tokenizer

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 4_000_000  # handed to the tokenizer at a time


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
        for batch in _batches(kept(table, answers)):
            for (side, text), tokens in zip(batch, encoder.encode_batch([text for _, text in batch]), strict=True):
                writers[side].write(text, tokens)
        counts = {split: writer.close() for split, writer in writers.items()}
        (temporary / shards.DESCRIPTION).write_text(json.dumps({"splits": counts}), encoding="utf-8")


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for side, text in documents:
        batch.append((side, text))
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
