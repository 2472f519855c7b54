"""Shards plus a position make batches: any sample of a run, in O(1), the same for any number of ranks.

A sample is one packed row of `context` positions. Sample k of a phase is a pure function of (seed, phase, k): the
mixture names its source, a permutation of that source's rows (another one each epoch) names the row. A step's global
batch is a range of samples; each rank takes every world-size-th of them. Nothing here has a state to save.

A stored document t1 .. tn END is trained as inputs BEGIN t1 .. tn with labels t1 .. tn END, so every token is learned
and generation starts from BEGIN: the token that the tokenizer declares to begin a text, or else END. Of conversations
only those labels stay whose token the shards' mask has as trained.
Beside them go a teacher's scores, where there are any (data/scores.py).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data.order import Mixture, mix, permuted
from data.packing import PackingPlan, pack
from data.scores import UNSCORED, Scores, least_k
from data.token_shards import TokenShards
from models.kernels.ignored import IGNORE

NO_DOCUMENT = 0  # document id of positions that are left over
_EMPTY_SAMPLE = -1  # sample id of a row that only fills up a rank's micro-batch


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one forward pass reads. B rows of T positions."""

    input_ids: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, IGNORE where nothing is learned
    document_ids: torch.Tensor  # [B, T] int64, one run of equal ids a document
    sample_ids: torch.Tensor  # [B] int64, position in the phase; -1: a row of nothing
    dropout_seeds: torch.Tensor | None = None  # [B] int64, a function of (seed, phase, sample)
    teacher_ids: torch.Tensor | None = None  # [B, T, k] int32, likeliest first; -1 where a position has no scores
    teacher_logprobs: torch.Tensor | None = None  # [B, T, k] float16, natural, at temperature 1

    @property
    def trained_tokens(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORE).sum())

    @property
    def read_tokens(self) -> int:
        """Positions that hold a document, whether they are trained or not."""
        return int((self.document_ids != NO_DOCUMENT).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*(None if tensor is None else change(tensor) for tensor in tensors))


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample: arrays of [context], int64."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    teacher_ids: np.ndarray | None = None  # [context, k] int32
    teacher_logprobs: np.ndarray | None = None  # [context, k] float16

    @staticmethod
    def empty(context: int, end_of_text: int, k: int | None = None) -> "Row":
        """A row in which nothing is learned, with room for k scores a position, or for none."""
        nothing = np.full(context, end_of_text), np.full(context, IGNORE), np.full(context, NO_DOCUMENT)
        if k is None:
            return Row(*nothing)
        return Row(*nothing, np.full((context, k), UNSCORED, np.int32), np.zeros((context, k), np.float16))


class PackedRows:
    """The rows of one split of one source at one context, with a teacher's scores where these are given."""

    def __init__(self, shards: TokenShards, context: int, scores: Scores | None = None):
        self.shards, self.context, self.scores = shards, context, scores
        self.plan: PackingPlan = pack(shards.lengths, context, whole=shards.masks is not None)

    def __len__(self) -> int:
        return len(self.plan)

    def row(self, index: int, k: int | None = None) -> Row:
        """Row `index`, with room for k scores a position, or for none; positions left over are a document of their
        own."""
        row = Row.empty(self.context, self.shards.end_of_text, k)
        position = 0
        first, last = self.plan.row_starts[index], self.plan.row_starts[index + 1]
        for number, piece in enumerate(range(first, last)):
            length = int(self.plan.length[piece])
            span = slice(position, position + length)
            document, offset = int(self.plan.document[piece]), int(self.plan.offset[piece])
            row.input_ids[span], row.labels[span] = self.shards.piece(document, offset, length)
            row.document_ids[span] = NO_DOCUMENT + 1 + number
            if k is not None and self.scores is not None:
                row.teacher_ids[span], row.teacher_logprobs[span] = self.scores.piece(document, offset, length, k)
            position += length
        return row


class PhaseLoader:
    """The training samples of one phase.

    Args:
        sources: shard folders by name; weights: share of samples by source name.
        seed, phase: name this phase's order.
        batch_rows: samples of one global batch; micro_rows: at most this many in one forward pass.
        pin_memory: hand out batches that a GPU can fetch while it computes.
        scores: folders of a teacher's scores by source name; batches have them where there are any.
    """

    def __init__(
        self,
        sources: Mapping[str, Path],
        weights: Mapping[str, float],
        *,
        context: int,
        seed: int,
        phase: int,
        batch_rows: int,
        micro_rows: int,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
        scores: Mapping[str, Path] | None = None,
    ):
        self.mixture = Mixture.of(weights)
        self.rows = {name: _rows(sources[name], "train", context, (scores or {}).get(name))
                     for name in self.mixture.names}  # fmt: skip
        self._k = least_k([rows.scores for rows in self.rows.values()])
        for name, rows in self.rows.items():
            if len(rows) == 0 and rows.plan.left_out:
                raise ValueError(f"data.sources.{name}: all {rows.plan.left_out} conversations are longer than the "
                                 f"phase's context of {context} tokens: raise it")  # fmt: skip
            if len(rows) == 0:
                raise ValueError(f"data.sources.{name}: no training document is left after preparation")
        self.context, self.seed, self.phase = context, seed, phase
        self.batch_rows, self.rank, self.world, self._pin_memory = batch_rows, rank, world, pin_memory
        rows_a_rank = -(-batch_rows // world)
        self.micro_batches = -(-rows_a_rank // micro_rows)
        self.micro_rows = -(-rows_a_rank // self.micro_batches)
        self._prefetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, Future] | None = None

    def sample(self, index: int) -> Row:
        """Sample `index` of the phase."""
        name, ordinal = self.mixture.locate(index)
        rows = self.rows[name]
        epoch, position = divmod(ordinal, len(rows))
        key = mix(self.seed, self.phase, self.mixture.names.index(name), epoch)
        return rows.row(permuted(position, len(rows), key), self._k)

    def step(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at `first_sample`; the next one is prefetched.

        Every rank gets the same number of micro-batches of the same shape, whatever the number of ranks; rows that
        the batch does not have are rows in which nothing is learned.
        """
        if self._next is not None and self._next[0] == first_sample:
            batches = self._next[1].result()
        else:
            batches = self._assemble(first_sample)
        following = first_sample + self.batch_rows
        self._next = (following, self._prefetcher.submit(self._assemble, following))
        return batches

    def left_out(self) -> dict[str, int]:
        """By source, the conversations that are longer than the context, where there are any."""
        return {name: rows.plan.left_out for name, rows in self.rows.items() if rows.plan.left_out}

    def close(self) -> None:
        """Stop prefetching."""
        self._prefetcher.shutdown(cancel_futures=True)

    def _assemble(self, first_sample: int) -> list[Batch]:
        mine = list(range(first_sample + self.rank, first_sample + self.batch_rows, self.world))
        mine += [_EMPTY_SAMPLE] * (self.micro_batches * self.micro_rows - len(mine))
        end_of_text = next(iter(self.rows.values())).shards.end_of_text
        empty = Row.empty(self.context, end_of_text, self._k)
        rows = [self.sample(k) if k >= 0 else empty for k in mine]
        parts = range(0, len(mine), self.micro_rows)
        batches = [_stack(rows[i : i + self.micro_rows], mine[i : i + self.micro_rows]) for i in parts]
        batches = [dataclasses.replace(batch, dropout_seeds=self._dropout_seeds(batch)) for batch in batches]
        return [batch.map(torch.Tensor.pin_memory) for batch in batches] if self._pin_memory else batches

    def _dropout_seeds(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([mix(self.seed, self.phase, k) >> 1 for k in batch.sample_ids.tolist()])


def validation_batches(
    folder: Path, context: int, rows: int, max_tokens: int | None, rank: int, world: int, scores: Path | None = None
) -> Iterator[Batch]:
    """The validation split of one source in order, `rows` a batch, this rank's share; stops after `max_tokens`
    positions over all ranks. Every rank gets the same number of batches; with a folder of `scores`, batches have
    them."""
    packed = _validation_rows(folder, context, scores)
    k = least_k([packed.scores])
    count = len(packed) if max_tokens is None else min(len(packed), max(1, max_tokens // context))
    empty = Row.empty(context, packed.shards.end_of_text, k)
    for start in range(0, count, rows * world):
        mine = [index if index < count else _EMPTY_SAMPLE for index in range(start + rank, start + rows * world, world)]
        yield _stack([packed.row(index, k) if index >= 0 else empty for index in mine], mine)


@functools.lru_cache(8)
def _validation_rows(folder: Path, context: int, scores: Path | None) -> PackedRows:
    """Packed once, not for every validation."""
    return _rows(folder, "valid", context, scores)


def _rows(folder: Path, split: str, context: int, scores: Path | None) -> PackedRows:
    shards = TokenShards(folder, split)
    return PackedRows(shards, context, None if scores is None else Scores(scores, split, shards))


def _stack(rows: list[Row], sample_ids: list[int]) -> Batch:
    def stacked(name: str) -> torch.Tensor | None:
        arrays = [getattr(row, name) for row in rows]
        return None if arrays[0] is None else torch.from_numpy(np.stack(arrays))

    names = [field.name for field in dataclasses.fields(Row)]
    return Batch(**{name: stacked(name) for name in names}, sample_ids=torch.tensor(sample_ids))
