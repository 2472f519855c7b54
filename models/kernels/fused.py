"""RMSNorm, rotary positions, products of one input and SwiGLU's with hand-written gradients, for CPUs.

CUDA has fused kernels for them, and torch.compile makes them; on a CPU torch falls back to single operations, each of
which keeps what it has read for the backward pass. These keep their inputs alone, in fewer passes over memory. A graph
recorded for other programs holds plain operations instead, which every one of them has.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _is_recorded() -> bool:
    """Whether a graph is being recorded for another program: by torch.jit.trace, or torch.export."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019) over the last dimension."""
    if _is_recorded():
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    if gate.device.type == "cpu" and torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, T, heads, D] turned by its positions' angles (RoFormer, Su et al. 2021), in fp32, returned in x's dtype.

    cos, sin: [B or 1, T, 1, D], each angle at i and at i + D/2, the first half of sin negative (RotaryTable).
    """
    if _is_recorded():
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([second, first], dim=-1) * sin).to(x.dtype)
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return _Rotation.apply(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's output for the same input `x` [..., d]; the gradient of `x` is summed where it is made."""
    plain = all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers)
    if x.device.type != "cpu" or not torch.is_grad_enabled() or not plain:
        return tuple(layer(x) for layer in layers)
    weights = [layer.weight for layer in layers]
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    return _Linears.apply(x, *weights)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        rows = x.flatten(0, -2)
        grads = [grad.flatten(0, -2) for grad in grads]
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        return grad_x.view_as(x), *(grad.T @ rows for grad in grads)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Without gradients, in half of torch's operations: of one token, each costs more than what it computes."""
    width = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    root_mean_square = torch.hypot(norm, _constant((eps * width) ** 0.5, x.dtype)).mul_(width**-0.5)
    return (x * weight).div_(root_mean_square)


@functools.cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """With n = x * scale and g = grad * weight: d weight = sum(grad * n), d x = scale * (g - n * mean(g * n))."""
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0)
        grad = grad * weight
        share = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(x.shape[-1])
        return grad.sub_(normed.mul_(share)).mul_(scale), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Turned back: the same angles, negative."""
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + swapped(x) * sin, where swapped(x) has the halves of x in the other order, without making it."""
    out = torch.mul(x, cos)
    half = x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out.to(x.dtype)
