"""Documents into rows of exactly `context` positions, wasting under 2% of them and cutting few documents.

A document longer than a row is cut into whole rows and a rest. The pieces are placed best-fit-decreasing, which keeps
them whole. Where that leaves gaps, the emptiest rows are dissolved and their pieces, cut to measure, fill the gaps of
the others. Only lengths are looked at, so a plan is small, fast and the same on every machine: pieces of equal length
are placed together, for there are far fewer lengths than documents. Conversations are never cut.
"""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Parts of documents, one an entry of each array [pieces] int64."""

    document: np.ndarray  # index of the document
    offset: np.ndarray  # first token of the piece within its document
    length: np.ndarray  # tokens

    def __getitem__(self, chosen: np.ndarray) -> "Pieces":
        return Pieces(self.document[chosen], self.offset[chosen], self.length[chosen])


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Which pieces of which documents make up each row. Row i holds pieces row_starts[i] .. row_starts[i + 1]."""

    context: int
    row_starts: np.ndarray  # [rows + 1] int64
    document: np.ndarray  # [pieces] int64, index of the document
    offset: np.ndarray  # [pieces] int64, first token of the piece within its document
    length: np.ndarray  # [pieces] int64
    left_out: int = 0  # documents that are longer than a row and must not be cut

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def waste(self) -> float:
        """Share of positions that hold no token."""
        return 1 - int(self.length.sum()) / max(len(self) * self.context, 1)


def pack(lengths: np.ndarray, context: int, whole: bool = False) -> PackingPlan:
    """Plan rows of `context` positions for documents of `lengths` [documents] tokens.

    `whole`: none is cut. Those longer than a row are left out, and gaps stay, for half a conversation teaches answers
    to questions that are not there.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces = _cut(lengths, context)
    if whole:
        pieces = pieces[lengths[pieces.document] <= context]
    row = _best_fit_decreasing(pieces.length, context)
    if not whole:
        pieces, row = _fill_gaps(pieces, row, context, smallest=max(1, context // 64))
    order = np.argsort(row, kind="stable")  # within a row, as they were placed
    row_starts = np.concatenate([[0], np.bincount(row).cumsum()])
    pieces = pieces[order]
    left_out = int((lengths > context).sum()) if whole else 0
    return PackingPlan(context, row_starts, pieces.document, pieces.offset, pieces.length, left_out)


def _cut(lengths: np.ndarray, context: int) -> Pieces:
    """Every document as pieces of at most `context` tokens, longest first, equal ones in document order."""
    count = -(-lengths // context)  # [documents]
    document = np.repeat(np.arange(len(lengths)), count)
    offset = (np.arange(len(document)) - np.repeat(count.cumsum() - count, count)) * context
    pieces = Pieces(document, offset, np.minimum(context, lengths[document] - offset))
    return pieces[np.argsort(-pieces.length, kind="stable")]


def _best_fit_decreasing(lengths: np.ndarray, context: int) -> np.ndarray:
    """The row of each piece [pieces], where each, longest first, goes into the row that it fills best.

    Rows with r free positions wait in room[r], the one that came last to be filled first. A row that is the best fit
    for a piece is, with what is then left of it, the best fit for the next one of the same length too; so pieces of one
    length go into a row until it has no room for more, and into all rows of the same room at once.
    """
    row = np.empty(len(lengths), dtype=np.int64)
    room: dict[int, list[np.ndarray]] = {}  # free positions: stack of rows, in parts
    rows = placed = 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for free in [*sorted(free for free in room if free >= length), context]:
            if not count:
                break
            fitting = free // length  # pieces a row
            wanted = -(-count // fitting)
            if free == context:
                taken = np.arange(rows, rows + wanted)
                rows += wanted
            else:
                taken = _pop(room, free, wanted)
            here = min(count, len(taken) * fitting)
            row[placed : placed + here] = np.repeat(taken, fitting)[:here]
            placed, count = placed + here, count - here
            rest = len(taken) * fitting - here  # places that the last row still has for pieces of this length
            _push(room, free - fitting * length, taken[: len(taken) - (rest > 0)])
            if rest:
                _push(room, free - (fitting - rest) * length, taken[-1:])
    return row


def _push(room: dict[int, list[np.ndarray]], free: int, rows: np.ndarray) -> None:
    if free and len(rows):
        room.setdefault(free, []).append(rows)


def _pop(room: dict[int, list[np.ndarray]], free: int, wanted: int) -> np.ndarray:
    """At most `wanted` rows with `free` positions, the last one first."""
    stack, taken = room[free], []
    while stack and wanted:
        rows = stack.pop()
        if len(rows) > wanted:
            stack.append(rows[:-wanted])
            rows = rows[-wanted:]
        taken.append(rows[::-1])
        wanted -= len(rows)
    if not stack:
        del room[free]
    return np.concatenate(taken)


def _fill_gaps(pieces: Pieces, row: np.ndarray, context: int, smallest: int) -> tuple[Pieces, np.ndarray]:
    """Dissolve the emptiest rows into the gaps of the others; returns the pieces and their rows, fullest row first.
    Gaps under `smallest` positions stay, but what a cut leaves over can be a shorter piece."""
    filled = np.bincount(row, pieces.length).astype(np.int64)  # [rows]
    fullest_first = np.argsort(-filled, kind="stable")
    free = context - filled[fullest_first]
    gaps = np.where(free >= smallest, free, 0)
    # how many rows have to go: their tokens must find room in the gaps of those that stay
    needed = (filled[fullest_first] + gaps)[::-1].cumsum()
    kept = len(filled) - min(int(np.searchsorted(needed, gaps.sum(), side="right")), max(len(filled) - 1, 0))
    rank = np.empty_like(fullest_first)
    rank[fullest_first] = np.arange(len(filled))
    rank = rank[row]  # of each piece's row
    stays, goes = rank < kept, np.flatnonzero(rank >= kept)
    goes = goes[np.argsort(rank[goes], kind="stable")]
    moved, their_rows = _poured(pieces[goes], free[:kept], smallest, context)
    together = [np.concatenate(parts) for parts in zip(dataclasses.astuple(pieces[stays]), moved.T, strict=True)]
    return Pieces(*together), np.concatenate([rank[stays], their_rows])


def _poured(donors: Pieces, free: np.ndarray, smallest: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """`donors`, in order and cut to measure, put into the `free` positions [rows] of the rows there are, widest gap
    first, and what rounding leaves over into new rows: (document, offset, length) [parts, 3] and their rows [parts]."""
    left = list(zip(*(column.tolist() for column in dataclasses.astuple(donors)), strict=True))[::-1]
    wide = np.flatnonzero(free >= smallest)[::-1]
    gaps = ((row, space, smallest) for row, space in zip(wide.tolist(), free[wide].tolist(), strict=True))
    new_rows = ((row, context, 1) for row in itertools.count(len(free)))
    parts, rows = [], []
    for row, space, least in itertools.chain(gaps, new_rows):
        while left and space >= least:
            document, offset, length = left.pop()
            taken = min(length, space)
            parts.append((document, offset, taken))
            rows.append(row)
            space -= taken
            if taken < length:
                left.append((document, offset + taken, length - taken))
        if not left:
            break
    return np.array(parts, dtype=np.int64).reshape(-1, 3), np.array(rows, dtype=np.int64)
