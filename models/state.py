"""What a model remembers between tokens while it decodes.

`State.layers` holds what each block's `new_memory(batch, device, dtype)` gave. Of attention that is a `LayerCache`: a
ring of `window` entries in windowed layers; in global ones as many as there are tokens, in storage that grows up to the
whole context. Keys are stored after rotation, so the order of entries in a ring does not matter. Whatever else a layer
remembers needs a `keep(rows)` like it.

Shapes: B sequences, t new tokens, K key/value heads, S cached entries, D head width.
"""

from typing import Protocol

import torch
from torch import Tensor

GRAIN = 64  # caches have a multiple of so many entries, as GPUs like them


class Memory(Protocol):
    """What one layer remembers of each sequence."""

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows` [n] int64, in that order."""


class LayerCache:
    """Keys and values of one layer, [B, K, entries, D], the entry of position p in slot p % capacity.

    Args:
        capacity: entries at most.
        entries: those that there is room for at first; `hold` makes more.
    """

    def __init__(
        self, batch: int, n_kv_heads: int, capacity: int, d_head: int, device: torch.device, dtype: torch.dtype,
        entries: int = 0,
    ):  # fmt: skip
        self.capacity = capacity
        self.keys = torch.zeros(batch, n_kv_heads, entries, d_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def hold(self, entries: int) -> None:
        """Have room for so many entries, or for `capacity`. Tensors of other storage then hold what there is."""
        if self.keys.shape[2] < min(entries, self.capacity):
            self.keys, self.values = (_longer(old, min(entries, self.capacity)) for old in (self.keys, self.values))

    def extend(self, key: Tensor, value: Tensor, state: "State") -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in `key` and `value` [B, K, t, D]; return the keys and values to attend to, [B, K, S, D], and
        which of them each new token sees, [B or 1, 1, t, S] bool, or None for all."""
        start, new = state.length, key.shape[2]
        key, value = key.to(self.keys.dtype), value.to(self.values.dtype)
        if new == 1:
            if state.place is None:
                self.keys.narrow(2, start % self.capacity, 1).copy_(key)
                self.values.narrow(2, start % self.capacity, 1).copy_(value)
            else:
                self.keys.index_copy_(2, state.place % self.capacity, key)
                self.values.index_copy_(2, state.place % self.capacity, value)
            keys, values, entries = self.keys, self.values, state.entries(self.capacity)
            if entries < keys.shape[2]:
                keys, values = keys.narrow(2, 0, entries), values.narrow(2, 0, entries)
            return keys, values, state.visible.get(self.capacity)
        kept = min(start, self.capacity)
        old = torch.arange(start - kept, start, device=key.device)
        keys = torch.cat([self.keys[:, :, old % self.capacity], key], dim=2)
        values = torch.cat([self.values[:, :, old % self.capacity], value], dim=2)
        positions = torch.arange(start - kept, start + new, device=key.device)
        query_positions = positions[kept:, None]
        visible = ((positions <= query_positions) & (positions > query_positions - self.capacity))[None]
        if state.left_padding is not None:
            # a padding token sees itself, so that no row of the softmax is empty
            real = positions[None, None] >= state.left_padding[:, None, None]
            visible = visible & (real | (positions == query_positions))
        last = positions[-min(new, self.capacity) :]
        self.keys[:, :, last % self.capacity] = key[:, :, -len(last) :]
        self.values[:, :, last % self.capacity] = value[:, :, -len(last) :]
        return keys, values, visible[:, None]

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows` [n] int64, in that order."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)


def _longer(old: Tensor, entries: int) -> Tensor:
    """`old` [B, K, S, D] with zeros behind it: what is not yet filled is masked, but a NaN would come through."""
    new = old.new_zeros(*old.shape[:2], entries, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


class State:
    """What a model has seen of its sequences: every layer's memory and how many tokens went in."""

    def __init__(self, layers: list[Memory], batch: int, context: int, left_padding: Tensor | None):
        self.layers = layers
        self.batch = batch
        self.context = context
        self.length = 0  # tokens taken in, padding included
        self.visible: dict[int, Tensor] = {}  # by a cache's capacity, [B, 1, 1, S]: what one new token sees; else all
        # While a step is recorded (models/inference/captured.py): `length` as a tensor [1], entries looked at
        self.place: Tensor | None = None
        self.span = 0
        self._room = 0  # entries that every cache has room for, as far as it looks back
        self._pad(left_padding)

    def _pad(self, left_padding: Tensor | None) -> None:
        self.left_padding = left_padding if left_padding is not None and bool(left_padding.any()) else None  # [B]
        self.end = self.context + (0 if self.left_padding is None else int(self.left_padding.max()))  # of the last one

    def refuse(self, new: int) -> None:
        """Raise ValueError if `new` tokens would fit no sequence's context. A sequence with less padding may be past
        its end: what it gives then means nothing, and it overwrites only what it has itself no more use for."""
        if self.length + new > self.end:
            raise ValueError(f"{self.length} + {new} tokens pass the end of the model's context of {self.context}")

    def reserve(self, new: int) -> None:
        """Make ready for `new` tokens, or `refuse` them."""
        self.refuse(new)
        self.hold(self.length + new)
        masked = new == 1 and (self.left_padding is not None or self.place is not None)
        capacities = {memory.capacity for memory in self.layers if isinstance(memory, LayerCache)} if masked else ()
        self.visible = {capacity: self._visible(capacity) for capacity in capacities}  # once for all layers of a kind

    def hold(self, entries: int) -> None:
        """Make room for the entries of so many tokens, padding included. Whoever keeps the caches' tensors, as a
        recording does, asks before for all that it will need: what there is room for stays where it is.

        Where that is not enough it becomes twice as much at least, so that copying costs little a token."""
        if entries <= self._room:
            return
        self._room = -(-max(entries, 2 * self._room) // GRAIN) * GRAIN
        for memory in self.layers:
            if isinstance(memory, LayerCache):
                memory.hold(self._room)

    def entries(self, capacity: int) -> int:
        """How many of a cache's entries one new token looks at."""
        return min(self.length + 1 if self.place is None else self.span, capacity)

    def _visible(self, capacity: int) -> Tensor:
        now = self.length if self.place is None else self.place
        first = self.left_padding[:, None] if self.left_padding is not None else now[:, None] * 0
        slots = torch.arange(self.entries(capacity), device=first.device)
        positions = now - (now - slots) % capacity  # below 0 where nothing is yet
        return (positions[None] >= first)[:, None, None]

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows` [n] int64, which from now on are the batch, in that order."""
        for memory in self.layers:
            memory.keep(rows)
        self.batch = len(rows)
        self._pad(None if self.left_padding is None else self.left_padding.index_select(0, rows))

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Of the next `new` tokens, [B or 1, new] int64. Padding does not count; what is past a sequence's context has
        its last position."""
        positions = torch.arange(new, device=device)[None] + (self.length if self.place is None else self.place)
        if self.left_padding is None:
            return positions
        return (positions - self.left_padding[:, None]).clamp(0, self.context - 1)

    def advance(self, new: int) -> None:
        """Count `new` tokens as seen."""
        self.length += new
