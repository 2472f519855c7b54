"""Weights as decoding likes them: small (bf16, or int8 with one scale a row), few and side by side in memory.

Decoding one sequence reads every weight once a token, so its speed is the weights' size over the memory's bandwidth:
half the bytes, twice the speed. Side by side they lie on huge pages, where the processor reads ahead further; matrices
that multiply the same input are one, for of one token every operation costs more than what it computes.

Norms compute and rotary tables stay in fp32; with bf16 weights everything else is bf16,
caches too, with int8 weights only the products' inputs are. For training neither is of use.
"""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import host

Weights = Literal["fp32", "bf16", "int8"]
HUGE_PAGE = 2**21  # bytes
INT8_BLOCK = 32  # columns that torch's int8 kernel for CPUs reads at once, at most, whether they are there or not


class Int8Linear(nn.Module):
    """x @ (weight * scale).T + bias with weight [out, in] int8 and scale [out]; symmetric, rounded to nearest."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("ones", torch.ones_like(scale, dtype=torch.bfloat16))  # the kernel rounds its scale
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[-1] % INT8_BLOCK == 0:
            # a kernel that reads int8 as it is; it is fast for bf16 activations alone
            out = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.weight, self.ones)
            out = out.view(*x.shape[:-1], -1)
        else:
            out = F.linear(x, self.weight.to(x.dtype))
        out = (out * self.scale).to(x.dtype)
        return out if self.bias is None else out + self.bias


class Bf16Linear(nn.Linear):
    """nn.Linear in bf16 that multiplies one row by a large matrix with a kernel that does not repack the matrix."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() != self.in_features or self.weight.numel() < 2**22:
            return super().forward(x)
        out = torch.mv(self.weight, x.flatten())
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """Rows of weight [V, d] int8 times their scale [V]."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.scale[ids][..., None]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [rows, columns], scale [rows] fp32) with weight close to int8 * scale: to half a scale at most."""
    scale = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).clamp_min(1e-12) / 127
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part in torch.arange(len(weight), device=weight.device).split(4096):  # without a second copy in fp32
        rows[part] = (weight[part] / scale[part, None]).round_().to(torch.int8)
    return rows, scale


@torch.no_grad()
def for_decoding(model: nn.Module, weights: Weights) -> nn.Module:
    """`model`, changed in place to decode with these weights; not to be trained any more."""
    for module in model.modules():
        _join(module)
    host.return_freed()  # the parts, before everything is copied once more
    if weights == "bf16":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):  # not the norms
                module.bfloat16()
            if isinstance(module, nn.Linear):
                module.__class__ = Bf16Linear
        if model.head is None:
            model.head = Bf16Linear(*model.embedding.weight.shape[::-1], bias=False, device="meta")
            model.head.weight = model.embedding.weight
    elif weights == "int8":
        _replace_linears(model)
        embedding = model.embedding.weight
        rows, scale = quantize(embedding)
        model.embedding = Int8Embedding(rows, scale)
        if model.head is None:
            model.head = Int8Linear(rows, scale)  # the same rows once more: they are stored once
    if model.final_norm.weight.device.type == "cpu":
        _lay_side_by_side(model)
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
