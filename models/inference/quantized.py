"""Weights of one byte: layers that multiply with int8 matrices, and how a matrix becomes one, with a scale a row.

Decoding one sequence reads every weight once a token: a quarter of the bytes, up to four times the speed. For training
they are of no use.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    scale = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).float().clamp_min(1e-12) / 127
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part in torch.arange(len(weight), device=weight.device).split(4096):  # without a second copy in fp32
        rows[part] = (weight[part] / scale[part, None]).round_().to(torch.int8)
    return rows, scale
