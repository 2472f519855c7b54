"""A model made ready to decode: small weights if they are asked for, few matrices, side by side in memory.

Matrices that multiply the same input become one, for of one token every operation costs more than what it computes.
Side by side, weights lie on huge pages, where the processor reads ahead further. Norms compute and rotary tables stay
in fp32; with bf16 weights everything else is bf16, caches too, with int8 weights only the products' inputs are.
"""

import functools
from typing import Literal

import torch
from torch import nn

from machine import process
from models.inference.quantized import Int8Embedding, Int8Linear, quantize
from models.kernels import row_products
from models.kernels.row_products import RowLinear

Weights = Literal["fp32", "bf16", "int8"]
HUGE_PAGE = 2**21  # bytes


@torch.no_grad()
def for_decoding(model: nn.Module, weights: Weights) -> nn.Module:
    """`model`, changed in place to decode with these weights; not to be trained any more."""
    for module in model.modules():
        _join(module)
    process.return_freed()  # the parts, before everything is copied once more
    if weights == "int8":
        _replace_linears(model)
        embedding = model.embedding.weight
        rows, scale = quantize(embedding)
        model.embedding = Int8Embedding(rows, scale)
        if model.head is None:
            model.head = Int8Linear(rows, scale)  # the same rows once more: they are stored once
    else:
        if model.head is None:
            model.head = nn.Linear(*model.embedding.weight.shape[::-1], bias=False, device="meta")
            model.head.weight = model.embedding.weight
        for module in model.modules():
            if weights == "bf16" and isinstance(module, nn.Linear | nn.Embedding):  # not the norms
                module.bfloat16()
            if isinstance(module, nn.Linear):
                module.__class__ = RowLinear
    if model.final_norm.weight.device.type == "cpu":
        _lay_side_by_side(model)
        row_products.choose(model)
    for module in model.modules():
        module.__class__ = _without_hooks(type(module))
    return model


@functools.cache
def _without_hooks(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, called without a look for hooks: they take longer to look for than a norm of one token to compute, and
    nobody puts any on a model that only decodes."""
    return type(kind.__name__, (kind,), {"__call__": kind.forward})


def _join(module: nn.Module) -> None:
    """Make one matrix of those that `module` multiplies with the same input."""
    parts = [getattr(module, name) for name in getattr(module, "JOINED", ())]
    if not parts:
        return
    rows, bias = sum(part.out_features for part in parts), parts[0].bias is not None
    module.joined = nn.Linear(parts[0].in_features, rows, bias, device="meta")
    module.joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
    if bias:
        module.joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
    for name in module.JOINED:
        delattr(module, name)


def _lay_side_by_side(model: nn.Module) -> None:
    """Move all parameters and buffers that are too small for huge pages of their own into one allocation, each at a
    multiple of 64 bytes."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}  # by storage: tied weights move together
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.nbytes < HUGE_PAGE:
                holders.setdefault(tensor.data_ptr(), []).append((module, name))
    sizes = [-(-getattr(*same[0]).nbytes // 64) * 64 for same in holders.values()]
    whole = torch.empty(max(sum(sizes), HUGE_PAGE), dtype=torch.uint8)
    for same, place in zip(holders.values(), whole[: sum(sizes)].split(sizes), strict=True):
        old = getattr(*same[0])
        new = place[: old.nbytes].view(old.dtype).view(old.shape).copy_(old)
        for module, name in same:
            tensor = getattr(module, name)
            if isinstance(tensor, nn.Parameter):
                tensor.data = new
            else:
                setattr(module, name, new)


def _replace_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            bias = None if child.bias is None else child.bias.data
            setattr(module, name, Int8Linear(*quantize(child.weight), bias))
        else:
            _replace_linears(child)
