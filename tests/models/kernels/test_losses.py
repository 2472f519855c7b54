"""The chunked head and loss against torch's own cross-entropy, and that all logits never exist."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels.ignored import IGNORE
from models.kernels.losses import linear_cross_entropy

WIDTH, VOCABULARY = 24, 150


def draw(count, ignored=0.3, dtype=torch.float32, seed=0):
    """hidden [N, d], weight [V, d], labels [N] with a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (count,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(count, generator=generator) < ignored, IGNORE)


def expected_loss(hidden, weight, labels):
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum", ignore_index=IGNORE)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("count", "chunk"), [(1, 16), (15, 16), (16, 16), (17, 16), (48, 16), (50, 7), (50, 1000)])
def test_loss_and_gradients_equal_cross_entropy(count, chunk, ignored):
    hidden, weight, labels = draw(count, ignored)
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    expected = expected_loss(hidden, weight, labels)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(0.37 * loss, (hidden, weight))
    for gradient, wanted in zip(found, torch.autograd.grad(0.37 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    if ignored == 1:
        assert loss == 0 and not any(gradient.any() for gradient in found)


def test_ignored_positions_get_exactly_no_gradient():
    hidden, weight, labels = draw(50)
    linear_cross_entropy(hidden, weight, labels, 8).backward()
    assert torch.equal(hidden.grad.any(dim=1), labels != IGNORE)


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_one_gradient_alone(needed):
    hidden, weight, labels = draw(20)
    wanted = {"hidden": hidden, "weight": weight}[needed]
    (expected,) = torch.autograd.grad(expected_loss(hidden, weight, labels), (wanted,))
    other = weight if needed == "hidden" else hidden
    other.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, 8).backward()
    assert other.grad is None
    torch.testing.assert_close(wanted.grad, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_evaluation_gives_the_same_loss():
    hidden, weight, labels = draw(20)
    loss = linear_cross_entropy(hidden, weight, labels, 8)
    torch.testing.assert_close(loss, expected_loss(hidden, weight, labels).float())


def test_sharp_logits_neither_overflow_nor_vanish():
    hidden, weight, labels = draw(20)
    with torch.no_grad():
        hidden.mul_(300)
    loss = linear_cross_entropy(hidden, weight, labels, 8)
    torch.testing.assert_close(loss, expected_loss(hidden, weight, labels).float(), rtol=1e-5, atol=0)
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_autocast_multiplies_in_bfloat16_and_sums_in_fp32():
    hidden, weight, labels = draw(3000)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 64)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    rounded_alike = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(loss, rounded_alike, rtol=1e-5, atol=0)
    expected = expected_loss(hidden, weight, labels)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=0)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_all_logits_never_exist(recorder):
    """Neither forward nor backward, whatever the number of tokens."""
    largest = {}
    for count in (512, 4096):
        hidden, weight, labels = draw(count)
        recorder.elements.clear()
        with recorder:
            linear_cross_entropy(hidden, weight, labels, 64).backward()
        largest[count] = recorder.largest
    assert largest[512] <= max(64 * VOCABULARY, 512 * WIDTH)
    assert largest[4096] <= 4096 * WIDTH < 4096 * VOCABULARY / 4
    recorder.elements.clear()
    with recorder:
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert recorder.largest >= 4096 * VOCABULARY, "the recorder would not have seen them"
