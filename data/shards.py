"""The format of token shards, and their writer.

A source's folder holds, for each split, numbered pairs of raw little-endian files and one description:

    train-00000.tokens   every document's tokens followed by one end-of-text, as uint16 or uint32
    train-00000.lengths  the number of tokens of each document, its end-of-text included, as int64
    dataset.json         counts of each split, names of its shards, the tokenizer they were made with, what was dropped

A document never spans two shards. The folder as a whole is written and verified by `storage.folder`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy

DESCRIPTION = "dataset.json"
LENGTHS = numpy.dtype("<i8")


def token_dtype(vocab_size: int) -> numpy.dtype:
    """The smallest type that holds every id of a vocabulary: uint16 or uint32."""
    return numpy.dtype("<u2" if vocab_size <= 65536 else "<u4")


class SplitWriter:
    """Writes the shards of one split, a new one whenever a document would not fit, and counts what it wrote.

    Args:
        shard_tokens: size at which a shard is full; only a single longer document makes a larger one.
    """

    def __init__(self, folder: Path, split: str, dtype: numpy.dtype, end_of_text: int, shard_tokens: int):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._end_of_text, self._shard_tokens = end_of_text, shard_tokens
        self._files: tuple[IO[bytes], ...] | None = None
        self._tokens_in_shard = 0
        self._shards: list[str] = []
        self.documents = self.tokens = self.characters = self.bytes = 0

    def write(self, text: str, tokens: Sequence[int]) -> None:
        """Append one document: its text is only counted, its tokens [n] are stored with an end-of-text behind them.

        Raises:
            OverflowError: a token id outside the vocabulary's type.
        """
        stored = numpy.array([*tokens, self._end_of_text], dtype=self._dtype)
        if self._files is None or self._tokens_in_shard + len(stored) > self._shard_tokens:
            self._next_shard()
        tokens_file, lengths_file = self._files
        tokens_file.write(stored.data)
        lengths_file.write(numpy.array([len(stored)], dtype=LENGTHS).data)
        self._tokens_in_shard += len(stored)
        self.documents += 1
        self.tokens += len(stored)
        self.characters += len(text)
        self.bytes += len(text.encode())

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _next_shard(self) -> None:
        self._close()
        stem = f"{self._split}-{len(self._shards):05d}"
        names = f"{stem}.tokens", f"{stem}.lengths"
        self._files = tuple(open(self._folder / name, "wb") for name in names)  # noqa: SIM115, closed by _close
        self._tokens_in_shard = 0
        self._shards.append(stem)

    def _close(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = None

    def describe(self) -> dict[str, object]:
        """This split's part of dataset.json; `bytes` are UTF-8 bytes of text."""
        counts = {key: getattr(self, key) for key in ("documents", "tokens", "characters", "bytes")}
        return {**counts, "shards": self._shards}
