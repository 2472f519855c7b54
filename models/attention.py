"""The one door to attention: causal, windowed, grouped-query, with document boundaries.

Every attention in the project goes through `attention` (training, prefill) or `attend_to_cache` (decoding). Windowed
layers never see a T x T mask: queries are cut into chunks of `window`, and each chunk meets only its own keys and the
chunk before it, so time and memory are O(T * window). Global layers need a mask only where documents are packed.

Shapes: B batch, T tokens, H query heads, K key/value heads (K divides H), D head width, W window.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the documents of a packed batch lie; made once a forward pass and shared by all layers."""

    segments: Tensor | None  # [B, T] int64, 0, 1, 2, ... along each row; None: every row is one document
    positions: Tensor  # [B, T] or [1, T] int64, restarting at 0 where a document starts

    @staticmethod
    def of(document_ids: Tensor | None, length: int, device: torch.device) -> "Layout":
        """From `document_ids` [B, T]: a document is a run of equal ids; None means one document a row."""
        steps = torch.arange(length, device=device)
        if document_ids is None:
            return Layout(None, steps[None])
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        first = torch.where(starts, steps, 0).cummax(dim=1).values
        return Layout(starts.cumsum(dim=1) - 1, steps - first)

    def mask(self, window: int | None) -> Tensor | None:
        """What `attention` needs to know about a layer with `window` (None: it sees everything)."""
        return self._band_mask(window) if _is_banded(window, self.positions.shape[1]) else self._full_mask()

    def _full_mask(self) -> Tensor | None:
        """[B, 1, T, T] bool, True where a query may look, or None when plain causality says it all."""
        if self.segments is None:
            return None
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same.tril_()[:, None]

    def _band_mask(self, window: int) -> Tensor:
        """[B or 1, chunks, 1, W, 2W] bool for `_banded`: query a of a chunk against the chunk before and itself."""
        length = self.positions.shape[1]
        chunks = -(-length // window)
        device = self.positions.device
        query = torch.arange(window, device=device)[:, None]
        key = torch.arange(2 * window, device=device)[None, :] - window  # relative to the chunk's first query
        inside = (key <= query) & (key > query - window)  # [W, 2W]
        exists = torch.arange(chunks, device=device)[:, None, None] * window + key >= 0  # [chunks, 1, 2W]
        mask = (inside & exists)[None]
        if self.segments is not None:
            padded = F.pad(self.segments, (0, chunks * window - length), value=-1).unflatten(1, (chunks, window))
            keys = torch.cat([F.pad(padded, (0, 0, 1, 0), value=-1)[:, :-1], padded], dim=2)
            mask = mask & (padded[:, :, :, None] == keys[:, :, None, :])
        return mask[:, :, None]


def attention(query: Tensor, key: Tensor, value: Tensor, window: int | None, mask: Tensor | None) -> Tensor:
    """Causal grouped-query attention over whole sequences.

    Args:
        query: [B, H, T, D]; key, value: [B, K, T, D], with rotary positions already applied.
        window: a token sees itself and the `window - 1` tokens before it; None: all before it.
        mask: `Layout.mask(window)`.

    Returns: [B, H, T, D].
    """
    if _is_banded(window, query.shape[2]):
        return _banded(query, key, value, window, mask)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _is_banded(window: int | None, length: int) -> bool:
    return window is not None and window < length


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, mask: Tensor) -> Tensor:
    """Windowed attention as small dense problems: [B * chunks, H, W, D] queries against [B * chunks, K, 2W, D] keys."""
    batch, _, length, _ = query.shape
    chunks = -(-length // window)
    padding = chunks * window - length

    def chunked(x: Tensor) -> Tensor:  # [B, heads, T, D] -> [B, chunks, heads, W, D]
        return F.pad(x, (0, 0, 0, padding)).unflatten(2, (chunks, window)).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:  # [B, chunks, K, W, D] -> [B * chunks, K, 2W, D]
        previous = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat([previous, x], dim=3).flatten(0, 1)

    out = F.scaled_dot_product_attention(
        chunked(query).flatten(0, 1),
        with_previous(chunked(key)),
        with_previous(chunked(value)),
        attn_mask=mask.expand(batch, -1, -1, -1, -1).flatten(0, 1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :length]


def attend_to_cache(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of `t` new queries over cached entries, in any order.

    Args:
        query: [B, H, t, D]; key, value: [B, K, S, D], of any dtype.
        visible: [B or 1, 1, t, S] bool, or None when every query sees every entry.

    Returns: [B, H, t, D] in query's dtype.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may be older than the autocast it is read under
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)


def reference(query: Tensor, key: Tensor, value: Tensor, window: int | None, document_ids: Tensor | None) -> Tensor:
    """The definition, in float64 and without cleverness: what tests and benchmarks compare against."""
    query, key, value = query.double(), key.double(), value.double()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    length = query.shape[2]
    i = torch.arange(length, device=query.device)[:, None]
    j = torch.arange(length, device=query.device)[None, :]
    allowed = (j <= i) & (j > i - (window or length))
    if document_ids is not None:
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ value
