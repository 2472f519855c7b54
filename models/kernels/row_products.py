"""Products of a matrix with one row, or a few: all that decoding one sequence does, and most of the time it takes.

Each weight is read once for every token, so the product should be as fast as memory is. Which of torch's kernels comes
near that depends on processor, threads, type and shape: one that is three times as fast on one machine is the slowest
on another. So they are measured on the model's own matrices, in their order, and each shape gets the fastest.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # rows; with more of them, torch's own product reads no more than it must
PARTS = (8, 4, 2, 29, 5, 3, 7)  # into how many a matrix may be cut; 29 is for GPT-2's vocabulary
CLEARLY = 1.3  # times faster than torch's own product: small differences change from one measurement to the next
ROUNDS = 3  # of measuring; the best one counts
MOST_MATRICES = 8  # of one shape that are measured: enough of them that they do not stay in the cache

Product = Callable[[Tensor, Tensor], Tensor]  # (x [n, in], weight [out, in]) -> [n, out]


def by_vector(x: Tensor, weight: Tensor) -> Tensor:
    """Matrix times vector, row by row."""
    return torch.stack([torch.mv(weight, row) for row in x])


def in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """As a batch of equal parts of the matrix, which another kernel multiplies."""
    parts = next((parts for parts in PARTS if len(weight) % parts == 0), 0)
    if not parts:
        return F.linear(x, weight)
    columns = x.T.unsqueeze(0).expand(parts, -1, -1)  # of these very strides: other ones take another kernel again
    return torch.bmm(weight.view(parts, -1, weight.shape[1]), columns).flatten(0, 1).T


PRODUCTS: tuple[Product, ...] = (F.linear, by_vector, in_parts)  # the first is torch's own


class RowLinear(nn.Linear):
    """nn.Linear whose product with at most `FEW` rows may be another one."""

    product: Product = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.product is F.linear or rows > FEW:
            return super().forward(x)
        out = self.product(x.reshape(rows, self.in_features), self.weight)
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


@torch.inference_mode()
def choose(model: nn.Module) -> None:
    """Give every RowLinear of `model` the product that is fastest here for its shape."""
    layers: dict[tuple, list[RowLinear]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, RowLinear):
            layers[(module.weight.shape, module.weight.dtype)].append(module)
    measured = {id(layer) for same in layers.values() for layer in same[:MOST_MATRICES]}
    in_order = [module for module in model.modules() if id(module) in measured]
    fastest: dict[tuple, dict[Product, float]] = defaultdict(lambda: dict.fromkeys(PRODUCTS, math.inf))
    for _ in range(ROUNDS):
        for product in PRODUCTS:
            spent: dict[tuple, float] = defaultdict(float)
            for layer in in_order:
                spent[(layer.weight.shape, layer.weight.dtype)] += _seconds(product, layer.weight)
            for kind, seconds in spent.items():
                fastest[kind][product] = min(fastest[kind][product], seconds)
    for kind, seconds in fastest.items():
        best = min(PRODUCTS, key=seconds.get)
        for layer in layers[kind]:
            layer.product = best if seconds[best] * CLEARLY < seconds[PRODUCTS[0]] else PRODUCTS[0]


def _seconds(product: Product, weight: Tensor) -> float:
    x = weight.new_ones(1, weight.shape[1])
    began = time.perf_counter()
    product(x, weight)
    return time.perf_counter() - began
