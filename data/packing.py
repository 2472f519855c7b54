"""Documents into rows of exactly `context` positions, wasting under 2% of them and cutting few documents.

A document longer than a row is cut into whole rows and a rest. The pieces are placed best-fit-decreasing, which keeps
them whole. Where that leaves gaps, the emptiest rows are dissolved and their pieces, cut to measure, fill the gaps of
the others. Only lengths are looked at, so a plan is small, fast and the same on every machine.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Which pieces of which documents make up each row. Row i holds pieces row_starts[i] .. row_starts[i + 1]."""

    context: int
    row_starts: np.ndarray  # [rows + 1] int64
    document: np.ndarray  # [pieces] int64, index of the document
    offset: np.ndarray  # [pieces] int64, first token of the piece within its document
    length: np.ndarray  # [pieces] int64

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def waste(self) -> float:
        """Share of positions that hold no token."""
        return 1 - int(self.length.sum()) / max(len(self) * self.context, 1)


Piece = tuple[int, int, int]  # document, offset, length


def pack(lengths: np.ndarray, context: int) -> PackingPlan:
    """Plan rows of `context` positions for documents of `lengths` [documents] tokens."""
    rows = _best_fit_decreasing(_pieces(lengths, context), context)
    rows = _fill_gaps(rows, context, smallest=max(1, context // 64))
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.array([piece for row in rows for piece in row], dtype=np.int64).reshape(-1, 3)
    row_starts = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
    return PackingPlan(context, row_starts, flat[:, 0].copy(), flat[:, 1].copy(), flat[:, 2].copy())


def _pieces(lengths: np.ndarray, context: int) -> list[Piece]:
    """Every document as pieces of at most `context` tokens, longest first."""
    pieces = []
    for document, length in enumerate(lengths.tolist()):
        for offset in range(0, length, context):
            pieces.append((document, offset, min(context, length - offset)))
    pieces.sort(key=lambda piece: -piece[2])  # stable: equal lengths stay in document order
    return pieces


def _best_fit_decreasing(pieces: list[Piece], context: int) -> list[list[Piece]]:
    """Put each piece, longest first, into the row it fills best. Rows with r free positions wait in room[r]; bit r of
    `rooms` says whether there is one, so that the best fit is the lowest set bit from the piece's length up."""
    rows: list[list[Piece]] = []
    room: list[list[int]] = [[] for _ in range(context + 1)]
    rooms = 0
    for piece in pieces:
        length = piece[2]
        fitting = rooms >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            index = room[free].pop()
            if not room[free]:
                rooms &= ~(1 << free)
            rows[index].append(piece)
        else:
            free, index = context, len(rows)
            rows.append([piece])
        left = free - length
        if left:
            room[left].append(index)
            rooms |= 1 << left
    return rows


def _fill_gaps(rows: list[list[Piece]], context: int, smallest: int) -> list[list[Piece]]:
    """Dissolve the emptiest rows into the gaps of the others. Gaps under `smallest` positions stay, but what a cut
    leaves over can be a shorter piece."""
    filled = [sum(length for _, _, length in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (-filled[index], index))  # fullest first
    gaps = sum(context - filled[index] for index in order if context - filled[index] >= smallest)
    kept = len(order)
    while kept > 1:  # how many rows have to go: their tokens must find room in the gaps of those that stay
        emptiest = order[kept - 1]
        own_gap = context - filled[emptiest]
        if filled[emptiest] > gaps - (own_gap if own_gap >= smallest else 0):
            break
        gaps -= filled[emptiest] + (own_gap if own_gap >= smallest else 0)
        kept -= 1
    donors = [piece for index in order[kept:] for piece in rows[index]]
    donors.reverse()
    result = [list(rows[index]) for index in order[:kept]]
    free = [context - filled[index] for index in order[:kept]]
    for row in range(kept - 1, -1, -1):  # the widest gaps first, so that cuts are few
        while donors and free[row] >= smallest:
            document, offset, length = donors.pop()
            taken = min(length, free[row])
            result[row].append((document, offset, taken))
            free[row] -= taken
            if taken < length:
                donors.append((document, offset + taken, length - taken))
    while donors:  # what rounding left over
        result.append([])
        left = context
        while donors and left:
            document, offset, length = donors.pop()
            taken = min(length, left)
            result[-1].append((document, offset, taken))
            left -= taken
            if taken < length:
                donors.append((document, offset + taken, length - taken))
    return result
