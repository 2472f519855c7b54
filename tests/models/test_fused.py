"""The hand-written gradients against autograd's own, in float64 and as finite differences."""

import pytest
import torch
import torch.nn.functional as F

from models.fused import rms_norm, swiglu


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
