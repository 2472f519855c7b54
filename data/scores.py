"""A teacher's probabilities beside prepared shards: their format, their reader, and which belong to which shards.

`distill.score` writes them, for every trained token of the folder of shards beside which they lie, in its order:

    scores-NAME-FINGERPRINT/
        train-00000.top_ids       [trained, k]: the likeliest tokens in each place, likeliest first, in the shards' type
        train-00000.top_logprobs  [trained, k]: their natural log-probabilities at temperature 1, as float16
        scores.json               the shards' digest, the teacher, k, and counts

Tokens that are only read (mask 0) have no scores; of shards without masks all tokens have. The names of the files are
those of the shards' own.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import shards
from data.sources import SourceError
from data.token_shards import TokenShards
from models.kernels.ignored import UNSCORED
from storage.folder import sums

DESCRIPTION = "scores.json"
IDS, LOGPROBS = ".top_ids", ".top_logprobs"
LOGPROB = np.dtype("<f2")


def describe(folder: Path) -> dict[str, Any]:
    """The folder's scores.json. Raises SourceError where it cannot be read, or is none."""
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        about, told = None, f" ({error})"
    else:
        told = ""
    if not isinstance(about, dict) or not {"shards", "teacher", "k"} <= set(about):
        raise SourceError(f"{folder / DESCRIPTION} does not describe scores{told}: remove its folder and run "
                          "distill.score again")  # fmt: skip
    return about


def digest(folder: Path) -> str:
    """What tells the scores of a folder from any other's: a sum over the sums of its numbers."""
    of_numbers = {name: digest for name, digest in sums(folder).items() if name.endswith((IDS, LOGPROBS))}
    return hashlib.sha256(json.dumps(of_numbers, sort_keys=True).encode()).hexdigest()


def teacher_of(about: dict[str, Any]) -> str:
    """The teacher that a scores.json names, as a config names it: hub:OWNER/NAME, or the digest of its weights."""
    teacher = about["teacher"]
    return f"hub:{teacher['model']}" if "model" in teacher else teacher["digest"]


def beside(folder: Path, teacher: str | None = None) -> list[Path]:
    """The folders of scores of the shards in `folder`; of this teacher alone, if one is named: as `teacher_of` does, or
    by the first letters of its digest."""
    found, digest_ = [], shards.digest(folder)
    for path in sorted(folder.parent.glob(f"scores-*/{DESCRIPTION}")):
        about = describe(path.parent)
        is_named = teacher is None or teacher_of(about).startswith(teacher)
        if is_named and about["shards"] == digest_:
            found.append(path.parent)
    return found


class Scores:
    """The scores of one split of one prepared source, memory-mapped.

    Attributes:
        k: scores of a token.
    """

    def __init__(self, folder: Path, split: str, tokens: TokenShards):
        about = describe(folder)
        self.k: int = about["k"]
        self._tokens = tokens
        dtype = np.dtype(about["dtype"]).newbyteorder("<")
        stems = about["splits"][split]["shards"]
        self._ids = [_mapped(folder / f"{stem}{IDS}", dtype, self.k) for stem in stems]
        self._logprobs = [_mapped(folder / f"{stem}{LOGPROBS}", LOGPROB, self.k) for stem in stems]
        self._first = _trained_before(tokens)  # [documents]

    def piece(self, document: int, offset: int, length: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, log-probabilities float16), [length, k] each, of a piece of a document; UNSCORED and 0 where a
        token is not trained. Of more than k scores the k likeliest are given."""
        shard, start = self._tokens.place(document)
        ids = np.full((length, k), UNSCORED, dtype=np.int32)
        logprobs = np.zeros((length, k), dtype=np.float16)
        trained: np.ndarray | slice = slice(None)
        first, count = int(self._first[document]) + offset, length
        if self._tokens.masks is not None:
            mask = self._tokens.masks[shard]
            trained = mask[start + offset : start + offset + length] != 0
            first += int(mask[start : start + offset].sum(dtype=np.int64)) - offset
            count = int(trained.sum())
        ids[trained] = self._ids[shard][first : first + count, :k]
        logprobs[trained] = self._logprobs[shard][first : first + count, :k]
        return ids, logprobs


def _mapped(path: Path, dtype: np.dtype, k: int) -> np.ndarray:
    """[trained, k] of a file, which may be empty."""
    if not path.stat().st_size:
        return np.zeros((0, k), dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").reshape(-1, k)


def _trained_before(tokens: TokenShards) -> np.ndarray:
    """[documents] int64: trained tokens of a document's shard that lie before it."""
    counts: list[np.ndarray] = []
    for shard, lengths in enumerate(tokens.shard_lengths):
        trained = lengths if tokens.masks is None else trained_of(tokens.masks[shard], lengths)
        counts.append(trained.cumsum() - trained)
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def trained_of(mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[documents] int64: trained tokens of each document of a shard, from its mask [tokens]."""
    starts = lengths.cumsum() - lengths
    return np.add.reduceat(mask, starts, dtype=np.int64) if len(lengths) else np.zeros(0, dtype=np.int64)


def least_k(scores: Sequence["Scores | None"]) -> int | None:
    """The k that all sources with scores have; None where none has any."""
    return min((source.k for source in scores if source is not None), default=None)
