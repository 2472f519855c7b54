"""First weights as a pure function of (seed, parameter name, row), so that every rank can draw its own part alone.

A parameter's rows are drawn in blocks, each from a generator of its own. However a matrix is cut by rows, over however
many ranks, the parts together are the same matrix; nobody has to hold the whole.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """torch's, without first weights of its own: they would be drawn for nothing."""

    def reset_parameters(self) -> None:
        """Nothing; the model's `initialise` gives all weights."""


class Embedding(nn.Embedding):
    """torch's, without first weights of its own."""

    def reset_parameters(self) -> None:
        """Nothing; the model's `initialise` gives all weights."""


BLOCK_ROWS = 1024  # drawn from one generator; changing it changes every model's first weights


def normal(seed: int, name: str, shape: Sequence[int], rows: slice | None = None) -> Tensor:
    """Rows `rows` (None: all) of the standard normal matrix [shape] that belongs to (seed, name); fp32, on the CPU."""
    height, *rest = shape
    first, end, _ = (rows or slice(None)).indices(height)
    wanted = torch.empty(end - first, *rest)
    for block in range(first // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, height)
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if first <= start and stop <= end:
            wanted[start - first : stop - first].normal_(generator=generator)
        else:  # a part of a block is that part of the whole
            drawn = torch.empty(stop - start, *rest).normal_(generator=generator)
            inside = slice(max(first, start), min(end, stop))
            wanted[inside.start - first : inside.stop - first] = drawn[inside.start - start : inside.stop - start]
    return wanted


@torch.no_grad()
def fill(parameter: nn.Parameter, values: Callable[[slice], Tensor]) -> None:
    """Give a parameter, whole or a sharded DTensor, its values; `values(rows)` is asked only for the rows held here."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if local.numel():
        local.copy_(values(local_rows(parameter)))


def local_rows(parameter: Tensor) -> slice:
    """The rows of `parameter` that this rank holds: all of a plain tensor's, a range of a DTensor's.

    Raises:
        ValueError: it is sharded along another dimension than its rows.
    """
    first, count = 0, parameter.shape[0]
    for dimension, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_shard(0):
            mesh = parameter.device_mesh
            size = -(-count // mesh.size(dimension))  # torch.chunk's cut, which DTensor makes
            start = min(mesh.get_local_rank(dimension) * size, count)
            first, count = first + start, min(size, count - start)
        elif placement.is_shard():
            raise ValueError(f"first weights are drawn by rows; {placement} cuts along another dimension")
    return slice(first, first + count)
