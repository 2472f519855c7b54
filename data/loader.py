"""Shards plus a position make batches: any sample of a run, in O(1), the same for any number of ranks.

A sample is one packed row of `context` positions. Sample k of a phase is a pure function of (seed, phase, k): the
mixture names its source, a permutation of that source's rows (another one each epoch) names the row. A step's global
batch is a range of samples; each rank takes every world-size-th of them. Nothing here has a state to save.

A stored document t1 .. tn END is trained as inputs END t1 .. tn with labels t1 .. tn END, so every token is learned
and generation starts from END. Of conversations only those labels stay whose token the shards' mask has as trained.
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
from data.shards import MASK, describe
from models.losses import IGNORE

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


class TokenShards:
    """One split of one prepared source: every document's tokens, memory-mapped.

    Attributes:
        about: counts of the split (data/shards.py).
        masks: which tokens are trained, of conversations; None: all are.
    """

    def __init__(self, folder: Path, split: str):
        about = describe(folder)
        self.about = about["splits"][split]
        self.end_of_text: int = about["end_of_text"]
        dtype = np.dtype(about["dtype"]).newbyteorder("<")
        stems = self.about["shards"]
        self.tokens = [np.memmap(folder / f"{stem}.tokens", dtype=dtype, mode="r") for stem in stems]
        lengths = [np.fromfile(folder / f"{stem}.lengths", dtype="<i8") for stem in stems]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)  # [documents]
        masked = "trained_tokens" in self.about
        self.masks = [np.memmap(folder / f"{stem}.mask", dtype=MASK, mode="r") for stem in stems] if masked else None
        self._first_document = np.cumsum([0, *(len(part) for part in lengths)])
        starts = [np.concatenate([[0], part.cumsum()[:-1]]) for part in lengths if len(part)]
        self._starts = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)

    def piece(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels), [length] each, of a piece of a document."""
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        start = int(self._starts[document]) + offset
        tokens = self.tokens[shard]
        labels = np.asarray(tokens[start : start + length], dtype=np.int64)
        inputs = np.empty_like(labels)
        inputs[0] = tokens[start - 1] if offset else self.end_of_text
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


class PackedRows:
    """The rows of one split of one source at one context."""

    def __init__(self, shards: TokenShards, context: int):
        self.shards = shards
        self.context = context
        self.plan: PackingPlan = pack(shards.lengths, context, whole=shards.masks is not None)

    def __len__(self) -> int:
        return len(self.plan)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids, labels, document_ids), [context] int64 each; positions left over are a document of their own."""
        inputs, labels, documents = empty_row(self.context, self.shards.end_of_text)
        position = 0
        first, last = self.plan.row_starts[index], self.plan.row_starts[index + 1]
        for number, piece in enumerate(range(first, last)):
            length = int(self.plan.length[piece])
            span = slice(position, position + length)
            document, offset = int(self.plan.document[piece]), int(self.plan.offset[piece])
            inputs[span], labels[span] = self.shards.piece(document, offset, length)
            documents[span] = NO_DOCUMENT + 1 + number
            position += length
        return inputs, labels, documents


def empty_row(context: int, end_of_text: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row in which nothing is learned."""
    return np.full(context, end_of_text), np.full(context, IGNORE), np.full(context, NO_DOCUMENT)


class PhaseLoader:
    """The training samples of one phase.

    Args:
        sources: shard folders by name; weights: share of samples by source name.
        seed, phase: name this phase's order.
        batch_rows: samples of one global batch; micro_rows: at most this many in one forward pass.
        pin_memory: hand out batches that a GPU can fetch while it computes.
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
    ):
        self.mixture = Mixture.of(weights)
        self.rows = {name: PackedRows(TokenShards(sources[name], "train"), context) for name in self.mixture.names}
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

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids, labels, document_ids), [context] each, of sample `index` of the phase."""
        name, ordinal = self.mixture.locate(index)
        rows = self.rows[name]
        epoch, position = divmod(ordinal, len(rows))
        key = mix(self.seed, self.phase, self.mixture.names.index(name), epoch)
        return rows.row(permuted(position, len(rows), key))

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
        rows = [self.sample(k) if k >= 0 else empty_row(self.context, end_of_text) for k in mine]
        parts = range(0, len(mine), self.micro_rows)
        batches = [_stack(rows[i : i + self.micro_rows], mine[i : i + self.micro_rows]) for i in parts]
        batches = [dataclasses.replace(batch, dropout_seeds=self._dropout_seeds(batch)) for batch in batches]
        return [batch.map(torch.Tensor.pin_memory) for batch in batches] if self._pin_memory else batches

    def _dropout_seeds(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([mix(self.seed, self.phase, k) >> 1 for k in batch.sample_ids.tolist()])


def validation_batches(
    folder: Path, context: int, rows: int, max_tokens: int | None, rank: int, world: int
) -> Iterator[Batch]:
    """The validation split of one source in order, `rows` a batch, this rank's share; stops after `max_tokens`
    positions over all ranks. Every rank gets the same number of batches."""
    packed = _validation_rows(folder, context)
    count = len(packed) if max_tokens is None else min(len(packed), max(1, max_tokens // context))
    for start in range(0, count, rows * world):
        mine = [index if index < count else _EMPTY_SAMPLE for index in range(start + rank, start + rows * world, world)]
        end_of_text = packed.shards.end_of_text
        content = [packed.row(i) if i >= 0 else empty_row(context, end_of_text) for i in mine]
        yield _stack(content, mine)


@functools.lru_cache(8)
def _validation_rows(folder: Path, context: int) -> PackedRows:
    """Packed once, not for every validation."""
    return PackedRows(TokenShards(folder, "valid"), context)


def _stack(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], sample_ids: list[int]) -> Batch:
    inputs, labels, documents = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Batch(inputs, labels, documents, torch.tensor(sample_ids))
