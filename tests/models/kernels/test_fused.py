"""The hand-written gradients against autograd's own, in float64 and as finite differences."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels.fused import linears, rms_norm, rotate, swiglu


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 4, 16)])
def test_rms_norm_is_its_definition_forward_and_backward(shape):
    x, weight = draw(*shape), draw(16, seed=1)
    definition = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), definition)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, 1e-2), (x, weight))
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), definition)


def test_rms_norm_of_nothing_is_nothing():
    x, weight = torch.zeros(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = rms_norm(x, weight, 1e-6)
    out.sum().backward()
    assert not out.any() and torch.isfinite(x.grad).all() and not weight.grad.any()


def test_swiglu_is_its_definition_forward_and_backward():
    gate, up = draw(3, 7), draw(3, 7, seed=1)
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def layers_of(*widths, bias=False):
    made = [torch.nn.Linear(6, width, bias=bias, dtype=torch.float64) for width in widths]
    for seed, layer in enumerate(made):
        layer.weight.data = draw(*layer.weight.shape, seed=seed).detach()
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_linears_are_each_layer_forward_and_backward(bias):
    layers, x = layers_of(4, 2, 5, bias=bias), draw(3, 7, 6, seed=9)
    for ours, layer in zip(linears(x, *layers), layers, strict=True):
        torch.testing.assert_close(ours, layer(x))

    ours = torch.autograd.grad(sum(out.square().sum() for out in linears(x, *layers)), [x, layers[1].weight])
    theirs = torch.autograd.grad(sum(layer(x).square().sum() for layer in layers), [x, layers[1].weight])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        for ours, layer in zip(linears(x, *layers), layers, strict=True):
            torch.testing.assert_close(ours, layer(x))


def test_linears_under_autocast_compute_in_its_precision():
    layers, x = [layer.float() for layer in layers_of(4, 2)], draw(3, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linears(x, *layers)
        expected = [layer(x) for layer in layers]
    assert all(torch.equal(*pair) and pair[0].dtype is torch.bfloat16 for pair in zip(out, expected, strict=True))
    sum(part.float().sum() for part in out).backward()
    assert x.grad.dtype is torch.float32 and layers[0].weight.grad.dtype is torch.float32


def test_rotation_is_its_definition_forward_and_backward():
    x = draw(2, 5, 3, 8)
    angles = torch.rand(1, 5, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, sin = angles.cos().repeat(1, 1, 1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)
    turned = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:]], dim=-1).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles))
    expected = torch.cat([turned[..., 0], turned[..., 1]], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected)
    with torch.no_grad():
        torch.testing.assert_close(rotate(x, cos, sin), expected)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


@pytest.mark.parametrize(("function", "shapes", "most"), [
    (lambda x, weight: rms_norm(x, weight, 1e-6), [(64, 32), (32,)], 64 * 32 + 32 + 64),
    (swiglu, [(64, 32), (64, 32)], 2 * 64 * 32),
])  # fmt: skip
def test_only_the_inputs_are_kept(function, shapes, most):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*(draw(*shape, seed=seed) for seed, shape in enumerate(shapes)))
    assert sum(kept.values()) <= most
