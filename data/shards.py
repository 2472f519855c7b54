"""The format of token shards, and their writer.

A source's folder holds, for each split, numbered pairs of raw little-endian files, and beside them a description:

    train-00000.tokens   every document's tokens followed by one end-of-text, as uint16 or uint32
    train-00000.lengths  the number of tokens of each document, its end-of-text included, as int64
    train-00000.mask     of conversations: 1 where a token is trained, 0 where it is only read, one uint8 a token
    dataset.json         counts of each split, names of its shards, the tokenizer they were made with, what was dropped,
                         and `special_tokens`: ids of those that training documents hold
    quarantine.jsonl     the rows that were no documents, if there were any: reason, place ("file:line"), detail

A document never spans two shards. The folder as a whole is written and verified by `storage.folder`.
"""

import collections
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from storage.folder import sums

DESCRIPTION, QUARANTINE = "dataset.json", "quarantine.jsonl"
SPLITS = ("train", "valid")
LENGTHS = numpy.dtype("<i8")
MASK = numpy.dtype("u1")
SCANNED_AT_ONCE = 2**22  # tokens
COUNTS = ("documents", "tokens", "characters", "bytes")  # of a split; `bytes` are UTF-8 bytes of text
TRAINED_COUNTS = ("trained_tokens", "trained_bytes")  # of conversations besides: what is trained, and its text


def token_dtype(vocab_size: int) -> numpy.dtype:
    """The smallest type that holds every id of a vocabulary: uint16 or uint32."""
    return numpy.dtype("<u2" if vocab_size <= 65536 else "<u4")


def tokenizers_beside(folder: Path) -> list[Path]:
    """The tokenizers that preparation has made, in the folders beside one of shards."""
    return sorted(path.parent for path in folder.parent.glob("tokenizer-*/tokenizer.json"))


def describe(folder: Path) -> dict[str, Any]:
    """The folder's dataset.json."""
    return json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))


def end_held_out(about: dict[str, Any]) -> str | None:
    """What there is to say where a document was cut in two, so that validation has any: from a dataset.json."""
    if "held_out_end" not in about:
        return None
    held_out, length = about["held_out_end"]["characters"], about["held_out_end"]["of"]
    return (f"no whole document is left for validation: the end of the last one is held out, {held_out:,} of its "
            f"{length:,} characters")  # fmt: skip


def digest(folder: Path) -> str:
    """What tells the documents of a folder from any other's, wherever its corpus lay: a sum over the sums of its tokens
    and of which of them are trained; and what is read before each, where that is not the end of another one."""
    begin = {name: value for name, value in describe(folder).items() if name == "begin_of_text"}
    ends = (".tokens", ".lengths", ".mask")
    of_tokens = {name: digest for name, digest in sums(folder).items() if name.endswith(ends)}
    return hashlib.sha256(json.dumps(of_tokens | begin, sort_keys=True).encode()).hexdigest()


def counts_of(masked: bool) -> dict[str, int]:
    """What is counted of a split, from 0."""
    return dict.fromkeys(COUNTS + (TRAINED_COUNTS if masked else ()), 0)


class SplitWriter:
    """Writes documents of one split into one shard, and counts what it wrote. `masked`: they are conversations."""

    def __init__(self, folder: Path, split: str, dtype: numpy.dtype, end_of_text: int, masked: bool = False):
        self._dtype, self._end_of_text = dtype, end_of_text
        stem = f"{split}-00000"
        self._stem = stem
        self._tokens = open(folder / f"{stem}.tokens", "wb")  # noqa: SIM115, closed by close
        self._lengths = open(folder / f"{stem}.lengths", "wb")  # noqa: SIM115
        self._mask = open(folder / f"{stem}.mask", "wb") if masked else None  # noqa: SIM115
        self._counts = counts_of(masked)

    def write_conversation(self, text: str, tokens: Sequence[int], mask: Sequence[int], answers: str) -> None:
        """Append one conversation, of which the tokens with mask 1 are trained; `answers` are their text.

        Raises:
            OverflowError: a token id outside the vocabulary's type.
        """
        self.write(text, tokens)
        self._mask.write(numpy.array([*mask, 0], dtype=MASK).data)
        self._counts["trained_tokens"] += sum(mask)
        self._counts["trained_bytes"] += len(answers.encode())

    def write(self, text: str, tokens: Sequence[int]) -> None:
        """Append one document: its text is only counted, its tokens [n] are stored with an end-of-text behind them.

        Raises:
            OverflowError: a token id outside the vocabulary's type.
        """
        stored = numpy.array([*tokens, self._end_of_text], dtype=self._dtype)
        self._tokens.write(stored.data)
        self._lengths.write(numpy.array([len(stored)], dtype=LENGTHS).data)
        for name, more in zip(COUNTS, (1, len(stored), len(text), len(text.encode())), strict=True):
            self._counts[name] += more

    def close(self) -> dict[str, Any]:
        """This split's part of dataset.json."""
        self._tokens.close()
        self._lengths.close()
        if self._mask:
            self._mask.close()
        return {**self._counts, "shards": [self._stem]}


def join(parts: Sequence[Path], target: Path, split: str, dtype: numpy.dtype, shard_tokens: int) -> dict[str, Any]:
    """Write the shards of one split to `target` from those in `parts`, one after the other; returns the split's part
    of dataset.json.

    Args:
        shard_tokens: size at which a shard is full; only a single longer document makes a larger one.
    """
    counts = collections.Counter(counts_of(masked=False))
    stems: list[str] = []
    room = 0
    for lengths, tokens, mask in _stored(parts, split, dtype, counts):
        first = start = 0
        while first < len(lengths):
            ends = lengths[first:].cumsum()
            fitting = int(numpy.searchsorted(ends, room, side="right"))
            if fitting == 0:
                stems.append(f"{split}-{len(stems):05d}")
                room = max(shard_tokens, int(lengths[first]))
                continue
            size = int(ends[fitting - 1])
            with open(target / f"{stems[-1]}.tokens", "ab") as file:
                file.write(tokens[start : start + size].data)
            with open(target / f"{stems[-1]}.lengths", "ab") as file:
                file.write(lengths[first : first + fitting].data)
            if mask is not None:
                with open(target / f"{stems[-1]}.mask", "ab") as file:
                    file.write(mask[start : start + size].data)
            first, start, room = first + fitting, start + size, room - size
    return {**counts, "shards": stems}


def special_tokens(folder: Path, about: dict[str, Any], special: Collection[int]) -> list[int]:
    """Which of the `special` ids the training documents in `folder` hold, in order; the token that ends each counts.
    `about` is the folder's dataset.json, in which preparation records them."""
    if "special_tokens" in about:
        return about["special_tokens"]
    held = numpy.zeros(max(about["vocab_size"], *special) + 1, dtype=bool)
    for _, tokens, _ in stored(folder, about, "train"):
        for start in range(0, len(tokens), SCANNED_AT_ONCE):
            held[tokens[start : start + SCANNED_AT_ONCE]] = True
    return sorted(token for token in special if held[token])


def _stored(
    parts: Sequence[Path], split: str, dtype: numpy.dtype, counts: collections.Counter[str]
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray | None]]:
    """What `stored` gives, of all parts; `counts` grow by what they hold."""
    for part in parts:
        about = describe(part)
        counts.update({name: count for name, count in about["splits"][split].items() if name != "shards"})
        yield from stored(part, about, split, dtype)


def stored(
    folder: Path, about: dict[str, Any], split: str, dtype: numpy.dtype | None = None
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray | None]]:
    """(lengths [documents] int64, tokens [sum of lengths], mask of that shape or None where all are trained; the last
    two memory-mapped) of each shard of one split that holds any.

    Args:
        about: the folder's dataset.json.
    """
    dtype = dtype or numpy.dtype(about["dtype"]).newbyteorder("<")
    for stem in about["splits"][split]["shards"]:
        lengths = numpy.fromfile(folder / f"{stem}.lengths", dtype=LENGTHS)
        if len(lengths):
            mask = folder / f"{stem}.mask"
            yield (lengths, numpy.memmap(folder / f"{stem}.tokens", dtype=dtype, mode="r"),
                   numpy.memmap(mask, dtype=MASK, mode="r") if mask.exists() else None)  # fmt: skip
