"""The one door to attention: causal, windowed, grouped-query, with document boundaries.

Every attention in the project goes through `attention` (training, prefill) or `attend_to_cache` (decoding). Windowed
layers never see a T x T mask. Two kernels do the work, and `kernel_for` alone decides which:

    banded   anywhere: queries are cut into chunks of `window`, and each chunk meets only its own keys and the chunk
             before it, as small dense problems for SDPA, on a CPU a few at a time. Layers that see everything take SDPA
             too; where documents are packed, on a CPU a document at a time, elsewhere some queries at a time.
    flex     CUDA: flex_attention (Dong et al. 2024), compiled, which visits only the blocks of 128 x 128 that window,
             document and causality leave, and never has a dense mask.

Plain causal attention over one document a row is SDPA's own on either. Time and memory of a windowed layer are
O(T * window). Shapes: B batch, T tokens, H query heads, K key/value heads (K divides H), D head width, W window.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from models.kernels.limits import allow_many

AT_ONCE = 1024  # queries of windowed layers on a CPU
PART = 256  # queries of layers that see everything, where a T x T mask would be needed and there is no flex attention
BLOCK = 128  # queries, and keys, of one block that flex attention visits or skips


class Documents(NamedTuple):
    """What layers that see everything may see, where no mask is made of it for all tokens at once."""

    segments: Tensor  # [B, T], as in Layout


Mask = Tensor | BlockMask | Documents | None  # what a layer may see; None: plain causality says it all


class Kernel(NamedTuple):
    """What computes attention, and why it was chosen."""

    name: Literal["banded", "flex"]
    reason: str


@functools.cache
def choose_kernel(device: torch.device, d_head: int, dtype: torch.dtype) -> Kernel:
    """The kernel for heads of width `d_head` on `device`, of queries of `dtype`."""
    if device.type != "cuda":
        return Kernel("banded", f"flex attention's compiled kernels need CUDA, this is {device.type}")
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    if float(capability) < 8:
        return Kernel("banded", f"flex attention needs compute capability 8.0, this GPU has {capability}")
    if d_head < 16:
        return Kernel("banded", f"flex attention needs heads of width 16, these have {d_head}")
    if find_spec("triton") is None or not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return Kernel("banded", "flex attention is compiled by Triton and a C compiler: install both to be faster")
    needed = 128 * d_head * 2 * dtype.itemsize  # bytes: a block of queries, and as much of keys and values on their way
    there = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    if dtype == torch.float32 and needed > there:
        return Kernel("banded", f"flex attention in fp32 needs {needed:,} bytes of shared memory for heads of width "
                                f"{d_head}, this GPU has {there:,}: bf16 needs half")  # fmt: skip
    return Kernel("flex", f"compiled for compute capability {capability}")


def kernel_for(device: torch.device, d_head: int, dtype: torch.dtype, length: int) -> str:
    """The kernel for sequences of `length` tokens: `choose_kernel`'s, but that flex attention, which is compiled for
    each shape, takes no odd lengths where nothing is trained. Questions have all lengths, and each would wait for the
    compiler until that gives up."""
    if length % BLOCK and not torch.is_grad_enabled():
        return "banded"
    return choose_kernel(device, d_head, dtype).name


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the documents of a packed batch lie; made once a forward pass and shared by all layers."""

    segments: Tensor | None  # [B, T] int64, 0, 1, 2, ... along each row; None: every row is one document
    positions: Tensor  # [B, T] or [1, T] int64, restarting at 0 where a document starts
    kernel: str = "banded"

    @staticmethod
    def of(document_ids: Tensor | None, length: int, device: torch.device, kernel: str = "banded") -> "Layout":
        """From `document_ids` [B, T]: a document is a run of equal ids; None means one document a row."""
        steps = torch.arange(length, device=device)
        if document_ids is None:
            return Layout(None, steps[None], kernel)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        first = torch.where(starts, steps, 0).cummax(dim=1).values
        return Layout(starts.cumsum(dim=1) - 1, steps - first, kernel)

    def mask(self, window: int | None) -> Mask:
        """What `attention` needs to know about a layer with `window` (None: it sees everything)."""
        banded = _is_banded(window, self.positions.shape[1])
        if self.segments is None and not banded:
            return None
        if self.kernel == "flex":
            _prepare_flex(self.positions.device.type)
            return self._block_mask(window if banded else None)
        if banded:
            return self._band_mask(window)
        return Documents(self.segments)

    def _block_mask(self, window: int | None) -> BlockMask:
        """Which blocks of keys each block of queries has to visit, and which of those need no look inside.

        Worked out from the blocks' first and last tokens alone: segments never decrease along a row, so a block's
        documents are those from its first token's to its last's.
        """
        length, device, segments = self.positions.shape[1], self.positions.device, self.segments
        reach = window or length
        first = torch.arange(0, length, BLOCK, device=device)
        last = (first + BLOCK).clamp_max(length) - 1
        query_first, query_last, key_first, key_last = first[:, None], last[:, None], first[None], last[None]
        some = ((key_first <= query_last) & (key_last > query_first - reach))[None]  # [1, queries, keys] of blocks
        every = ((key_last <= query_first) & (key_first > query_last - reach))[None]
        if segments is not None:
            lowest, highest = segments[:, first], segments[:, last]  # [B, blocks]
            some = some & (highest[:, None, :] >= lowest[:, :, None])
            every = every & (lowest[:, None, :] == highest[:, :, None])

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (key <= query) & (query - key < reach)
            return inside if segments is None else inside & (segments[b, query] == segments[b, key])

        def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:  # [B, 1, queries] counts, [B, 1, queries, keys] indices
            order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            return blocks.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

        return BlockMask.from_kv_blocks(
            *listed(some & ~every), *listed(every), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
        )

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


def attention(query: Tensor, key: Tensor, value: Tensor, window: int | None, mask: Mask) -> Tensor:
    """Causal grouped-query attention over whole sequences.

    Args:
        query: [B, H, T, D]; key, value: [B, K, T, D], with rotary positions already applied.
        window: a token sees itself and the `window - 1` tokens before it; None: all before it.
        mask: `Layout.mask(window)`.

    Returns: [B, H, T, D].
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        return _flex[query.device.type](query, key, value, block_mask=mask, enable_gqa=grouped)
    if isinstance(mask, Documents):
        solve = _apart if query.device.type == "cpu" else _in_parts  # to ask a GPU where documents lie is to wait
        return solve(query, key, value, mask.segments)
    if _is_banded(window, query.shape[2]):
        return _banded(query, key, value, window, mask)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


_flex: dict[str, Callable[..., Tensor]] = {"cpu": flex_attention}  # by device; the CPU's slow form is for tests


def _prepare_flex(device_type: str) -> None:
    """Before the blocks run: within a compiled block there is nothing left to decide."""
    if device_type not in _flex:
        allow_many()
        _flex[device_type] = torch.compile(flex_attention, dynamic=False)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA of queries [N, H, t, D] over [N, K, S, D] with `mask` [N or 1, 1, t, S], a group's queries one below the
    other. With `enable_gqa`, CUDA's kernels that take a mask, or fp32, would have the keys copied out."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    below = query.unflatten(1, (-1, groups)).flatten(2, 3)  # [N, K, H/K * t, D]
    mask = None if mask is None else mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(below, key, value, attn_mask=mask)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)


def _in_parts(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    """Causal attention within documents, some queries at a time; their mask is made where it is used, forward and
    backward, and not kept in between."""

    def part(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        end = key.shape[2]
        places = torch.arange(end, device=query.device)
        mask = (segments[:, start:end, None] == segments[:, None, :end]) & (places[start:, None] >= places)
        return _masked(query, key, value, mask[:, None])

    parts = []
    for start in range(0, query.shape[2], PART):
        end = start + PART
        some = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        parts.append(checkpoint(part, *some, start, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, dim=2)


def _apart(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    """Causal attention within documents, one after the other: time follows from their lengths, not from the row's."""
    if torch.is_autocast_enabled("cpu"):  # it knows SDPA, not what is behind it
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return _documents_apart(query, key, value, segments)[0]


def _places(segments: Tensor) -> list[tuple[slice, slice, slice]]:
    """Where each document lies in a tensor [B, heads, T, D]."""
    length = segments.shape[1]
    ends = (F.pad(segments, (0, 1), value=-1).diff(dim=1) != 0).nonzero().tolist()
    places, first = [], 0
    for row, last in ends:
        places.append((slice(row, row + 1), slice(None), slice(first, last + 1)))
        first = (last + 1) % length
    return places


# Operators of their own, so that torch.compile takes them as they are: each packing has other lengths.
@torch.library.custom_op("slms::documents_apart", mutates_args=(), device_types="cpu")
def _documents_apart(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], logsumexp [B, H, T])."""
    out, logsumexp = _like_results(query, key, value, segments)
    for place in _places(segments):
        out[place], logsumexp[place] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[place], key[place], value[place], 0.0, True
        )
    return out, logsumexp


@_documents_apart.register_fake
def _like_results(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, d_head = query.shape
    out = query.new_empty(batch, length, heads, d_head).transpose(1, 2)  # as the output projection reads it
    return out, query.new_empty(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("slms::documents_apart_backward", mutates_args=(), device_types="cpu")
def _documents_apart_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _like_gradients(grad, query, key, value, out, logsumexp, segments)
    for place in _places(segments):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[place], query[place], key[place], value[place], out[place], logsumexp[place], 0.0, True
        )
        for whole, own in zip(grads, found, strict=True):
            whole[place] = own
    return grads


@_documents_apart_backward.register_fake
def _like_gradients(grad, query, key, value, out, logsumexp, segments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments = inputs
    ctx.save_for_backward(query, key, value, *output, segments)


def _gradients(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_documents_apart_backward(grad, *ctx.saved_tensors), None


_documents_apart.register_autograd(_gradients, setup_context=_keep)


def _is_banded(window: int | None, length: int) -> bool:
    return window is not None and window < length


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, mask: Tensor) -> Tensor:
    """Windowed attention as small dense problems: each chunk's W queries against 2W keys, its own and those before."""
    batch, _, length, _ = query.shape
    chunks = -(-length // window)
    if padding := chunks * window - length:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))

    def chunked(x: Tensor) -> Tensor:  # [B, heads, T, D] -> [B * chunks, heads, W, D]
        return x.unflatten(2, (chunks, window)).transpose(1, 2).flatten(0, 1)

    solve = _solve_on_cpu if query.device.type == "cpu" else _solve
    out = solve(chunked(query), chunked(key), chunked(value), mask.expand(batch, -1, -1, -1, -1).flatten(0, 1))
    return out.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _solve(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The small problems' [N, H, W, D], of queries [N, H, W, D], keys and values [N, K, W, D], mask [N, 1, W, 2W].

    What stands before the first chunk of a row is the end of the row above, which the mask hides.
    """
    keys, values = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], x], dim=2) for x in (key, value))
    return _masked(query, keys, values, mask)


def _solve_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """`_solve`, a few problems at a time."""
    if torch.is_autocast_enabled("cpu"):  # it knows SDPA, not what is behind it
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return _SolveOnCPU.apply(query, key, value, mask)


class _SolveOnCPU(torch.autograd.Function):
    """A chunk's keys are put behind those of the chunk before it only while they are used, and gradients go straight to
    where they belong. In one call of SDPA, every key and value and their gradients would be in memory twice, and a long
    row would pay for as much fresh memory at once; here each few chunks use what the ones before have freed.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        count, heads, width, d_head = query.shape
        out = query.new_empty(count, width, heads, d_head).transpose(1, 2)  # as the output projection reads it
        logsumexp = query.new_empty(count, heads, width, dtype=torch.promote_types(query.dtype, torch.float32))
        for part in _parts(count, width):
            out[part], logsumexp[part] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[part], _behind_previous(key, part), _behind_previous(value, part),
                attn_mask=_additive(mask[part], query.dtype),
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, mask, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, mask, out, logsumexp = ctx.saved_tensors
        width = query.shape[2]
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for part in _parts(len(query), width):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[part], query[part], _behind_previous(key, part), _behind_previous(value, part), out[part],
                logsumexp[part], 0.0, False, attn_mask=_additive(mask[part], query.dtype),
            )  # fmt: skip
            grads[0][part] = found[0]
            for total, both in zip(grads[1:], found[1:], strict=True):
                before, own = both.chunk(2, dim=2)
                total[part] = own
                first = 1 if part.start == 0 else 0  # the very first chunk has none before it
                total[part.start - 1 + first : part.stop - 1] += before[first:]
        return *grads, None


def _parts(count: int, width: int) -> list[slice]:
    """`count` chunks of `width` queries, a few at a time."""
    size = max(1, AT_ONCE // width)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _behind_previous(x: Tensor, part: slice) -> Tensor:
    """Each chunk of `part` behind the one before it, zeros before the very first: [n, K, 2W, D] of [N, K, W, D]."""
    _, heads, width, d_head = x.shape
    out = x.new_empty(part.stop - part.start, 2 * width, heads, d_head).transpose(1, 2)
    out[:, :, width:] = x[part]
    first = 1 if part.start == 0 else 0
    out[:first, :, :width] = 0
    out[first:, :, :width] = x[part.start - 1 + first : part.stop - 1]
    return out


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, else -inf."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def attend_to_cache(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of `t` new queries over cached entries, in any order.

    Args:
        query: [B, H, t, D]; key, value: [B, K, S, D], of any dtype.
        visible: [B or 1, 1, t, S] bool, or numbers to add to the scores, or None when every query sees every entry.

    Returns: [B, H, t, D] in query's dtype.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may be older than the autocast it is read under
    return _masked(query, key, value, visible)


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
