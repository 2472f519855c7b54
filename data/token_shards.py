"""The tokens of a prepared source as its shards hold them, memory-mapped: what is asked for is read, a document or a
piece of one at a time."""

from pathlib import Path

import numpy as np

from data.shards import MASK, describe
from models.kernels.ignored import IGNORE


class TokenShards:
    """One split of one prepared source: every document's tokens, memory-mapped.

    Attributes:
        about: counts of the split (data/shards.py).
        lengths: tokens of each document; shard_lengths: the same, a shard an entry.
        masks: which tokens are trained, of conversations; None: all are.
    """

    def __init__(self, folder: Path, split: str):
        about = describe(folder)
        self.about = about["splits"][split]
        self.end_of_text: int = about["end_of_text"]
        self.begin_of_text: int = about.get("begin_of_text", self.end_of_text)  # what is read before a document
        dtype = np.dtype(about["dtype"]).newbyteorder("<")
        stems = self.about["shards"]
        self.tokens = [np.memmap(folder / f"{stem}.tokens", dtype=dtype, mode="r") for stem in stems]
        self.shard_lengths = lengths = [np.fromfile(folder / f"{stem}.lengths", dtype="<i8") for stem in stems]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)  # [documents]
        masked = "trained_tokens" in self.about
        self.masks = [np.memmap(folder / f"{stem}.mask", dtype=MASK, mode="r") for stem in stems] if masked else None
        self._first_document = np.cumsum([0, *(len(part) for part in lengths)])
        starts = [np.concatenate([[0], part.cumsum()[:-1]]) for part in lengths if len(part)]
        self._starts = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)

    def place(self, document: int) -> tuple[int, int]:
        """(shard, first token within it) of a document."""
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        return shard, int(self._starts[document])

    def piece(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels), [length] each, of a piece of a document."""
        shard, start = self.place(document)
        start += offset
        tokens = self.tokens[shard]
        labels = np.asarray(tokens[start : start + length], dtype=np.int64)
        inputs = np.empty_like(labels)
        inputs[0] = tokens[start - 1] if offset else self.begin_of_text
        inputs[1:] = labels[:-1]
        if self.masks is not None:
            labels[self.masks[shard][start : start + length] == 0] = IGNORE
        return inputs, labels

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained in one pass."""
        return self.about.get("trained_tokens", self.about["tokens"])

    @property
    def trained_tokens_per_byte(self) -> float:
        """Trained tokens over the bytes of their text, in UTF-8."""
        return self.trained_tokens / max(self.about.get("trained_bytes", self.about["bytes"]), 1)
