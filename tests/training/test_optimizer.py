"""Muon and AdamW in one class: each against torch's own or the paper's lines written out, and its state on its way
through a checkpoint."""

import math

import pytest
import torch
from torch import nn

import training.optimizer
from models import ModelConfig, build_model
from training.optimizer import NEWTON_SCHULZ_COEFFICIENTS, MuonAdamW, newton_schulz

SMALL = ModelConfig(vocab_size=61, context=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=8)


def matrix_with(singular_values, rows, columns, seed=0):
    """(matrix, U, V) with matrix = U diag(singular_values) V^T."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(singular_values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(singular_values), generator=generator, dtype=torch.float64))
    return (left * singular_values @ right.T).float(), left.float(), right.float()


def set_gradients(parameters, step):
    """Gradients that change from step to step and differ in size from parameter to parameter."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (-(number % 4))


# Newton-Schulz


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 40), (40, 16), (64, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_near_one_and_directions_stay(rows, columns, dtype):
    """Five steps of the quintic send every singular value from 1% of the norm upwards into [0.68, 1.14]."""
    smaller = min(rows, columns)
    values = torch.logspace(0, -1, smaller, dtype=torch.float64)
    matrix, left, right = matrix_with(values, rows, columns)
    assert values.min() / values.norm() > 0.01
    found = newton_schulz(matrix[None], dtype=dtype)[0]
    assert found.shape == matrix.shape and found.dtype == torch.float32
    margin = 0.0 if dtype == torch.float32 else 0.03
    spectrum = torch.linalg.svdvals(found)
    assert 0.68 - margin < spectrum.min() and spectrum.max() < 1.14 + margin
    turned = left.T @ found @ right  # diagonal when the directions are the matrix's own
    off_diagonal = turned - turned.diag().diag()
    assert off_diagonal.abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
    assert (turned.diag() > 0).all()
    assert torch.equal(found, newton_schulz(matrix[None])[0]) == (dtype == torch.float32)


def test_each_singular_value_goes_through_the_quintic():
    values = torch.tensor([3.0, 1.0, 0.2, 0.01, 0.0], dtype=torch.float64)
    matrix, left, right = matrix_with(values, 9, 7)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for steps in (1, 5):
        expected = values / values.norm()
        for _ in range(steps):
            expected = a * expected + b * expected**3 + c * expected**5
        found = (left.T @ newton_schulz(matrix[None], steps)[0] @ right).diag()
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_batch_is_orthogonalised_matrix_by_matrix_whatever_its_scale():
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([newton_schulz(matrix[None]) for matrix in matrices])
    scaled = newton_schulz(matrices * torch.tensor([1.0, 1e3, 1e-2])[:, None, None])
    torch.testing.assert_close(scaled, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(newton_schulz(matrices.mT), newton_schulz(matrices).mT, rtol=1e-4, atol=1e-5)
    assert not newton_schulz(torch.zeros(1, 4, 6)).any()


# Who gets what


def test_hidden_matrices_get_muon_and_only_matrices_decay():
    model = build_model(SMALL)
    optimizer = MuonAdamW(model.named_parameters(), muon_lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    groups = {
        tuple(sorted(optimizer.names[parameter] for parameter in group["params"])): group
        for group in optimizer.param_groups
    }
    hidden = tuple(sorted(name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2))
    norms = tuple(sorted(name for name, p in model.named_parameters() if p.ndim == 1))
    assert set(groups) == {hidden, ("embedding.weight",), norms}
    assert len(hidden) == 2 * 7
    kinds = {names: (group["kind"], group["lr"], group["weight_decay"]) for names, group in groups.items()}
    assert kinds[hidden] == ("muon", 0.02, 0.1)
    assert kinds["embedding.weight",] == ("adamw", 0.003, 0.1)
    assert kinds[norms] == ("adamw", 0.003, 0.0)


def test_without_a_muon_rate_everything_takes_adamw():
    """The same as torch's AdamW over all parameters, norms and biases without decay."""
    ours, theirs = build_model(SMALL), build_model(SMALL)
    named = list(theirs.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = MuonAdamW(ours.named_parameters(), muon_lr=None, adamw_lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-10)
    for step in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.arange(8)[None] + step).logsumexp(-1).sum().backward()
        optimizer.step()
        reference.step()
    for (name, one), (_, other) in zip(ours.named_parameters(), named, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
    assert "momentum_buffer" not in "".join(optimizer.tensors())


def test_matrices_of_one_shape_are_orthogonalised_in_bounded_batches(monkeypatch):
    """However many go together, each gets the same update."""
    seen, results = [], []
    original = training.optimizer.newton_schulz
    monkeypatch.setattr(training.optimizer, "newton_schulz", lambda x, **k: seen.append(x.numel()) or original(x, **k))
    for most in (2**26, 5000, 1):
        monkeypatch.setattr(training.optimizer, "MOST_STACKED", most)
        model = build_model(SMALL)
        optimizer = MuonAdamW(model.named_parameters())
        model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
        seen.clear()
        optimizer.step()
        largest = max(parameter.numel() for name, parameter in model.named_parameters() if "embedding" not in name)
        assert max(seen) <= max(most, largest)
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_untied_head_is_no_hidden_matrix():
    names = {"head.weight": "adamw", "model.head.weight": "adamw", "blocks.0.overhead.weight": "muon", "bias": "adamw"}
    parameters = {name: nn.Parameter(torch.ones(3) if name == "bias" else torch.ones(3, 3)) for name in names}
    optimizer = MuonAdamW(parameters.items())
    found = {optimizer.names[p]: group["kind"] for group in optimizer.param_groups for p in group["params"]}
    assert found == names


def test_the_learning_rate_scales_every_groups_peak():
    optimizer = MuonAdamW(build_model(SMALL).named_parameters(), muon_lr=0.02, adamw_lr=0.003)
    for multiplier in (0.5, 0.25, 1.0):
        optimizer.set_learning_rate(multiplier)
        rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {"muon": 0.02 * multiplier, "adamw": 0.003 * multiplier}


# The updates


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)])
def test_the_adamw_part_equals_torchs(weight_decay, betas):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding.weight": (7, 5), "norm.weight": (5,), "head.weight": (7, 5), "bias": (3,)}
    ours = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    optimizer = MuonAdamW(ours.items(), adamw_lr=0.01, betas=betas, eps=1e-8, weight_decay=weight_decay)
    groups = [
        {"params": [theirs["embedding.weight"], theirs["head.weight"]], "weight_decay": weight_decay},
        {"params": [theirs["norm.weight"], theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=betas, eps=1e-8)
    for step in range(8):
        multiplier = 1 / (1 + step)
        optimizer.set_learning_rate(multiplier)
        for group in reference.param_groups:
            group["lr"] = 0.01 * multiplier
        set_gradients(ours.values(), step)
        set_gradients(theirs.values(), step)
        optimizer.step()
        reference.step()
        for name in shapes:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def muon_as_published(parameter, gradient, momentum_buffer, *, lr, momentum, weight_decay):
    """One step of Muon (Jordan et al. 2024), a matrix at a time, in float64 and plain lines."""
    momentum_buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    x = (1 - momentum) * gradient + momentum * momentum_buffer
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x = x.T if tall else x
    scale = math.sqrt(max(1, x.shape[0] / x.shape[1]))
    parameter.mul_(1 - lr * weight_decay).sub_(lr * scale * x)


@torch.no_grad()
def test_the_muon_part_equals_the_published_lines():
    """Wide, square and tall matrices, two of them of one shape, over several steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 12), (8, 24), (24, 8), (8, 24)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [parameter.detach().double() for parameter in ours]
    buffers = [torch.zeros_like(tensor) for tensor in theirs]
    named = [(f"blocks.{number}.weight", parameter) for number, parameter in enumerate(ours)]
    optimizer = MuonAdamW(named, muon_lr=0.02, momentum=0.9, weight_decay=0.1)
    for step in range(5):
        set_gradients(ours, step)
        gradients = [parameter.grad.double() for parameter in ours]
        optimizer.step()
        for tensor, gradient, buffer in zip(theirs, gradients, buffers, strict=True):
            muon_as_published(tensor, gradient, buffer, lr=0.02, momentum=0.9, weight_decay=0.1)
        for parameter, tensor in zip(ours, theirs, strict=True):
            torch.testing.assert_close(parameter.double(), tensor, rtol=0, atol=2e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_the_muon_part_equals_torchs_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 12), (8, 24), (24, 8)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    named = [(f"blocks.{number}.weight", parameter) for number, parameter in enumerate(ours)]
    optimizer = MuonAdamW(named, muon_lr=0.02, weight_decay=0.1, newton_schulz_dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    start = [parameter.detach().clone() for parameter in ours]
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for parameter, other, before in zip(ours, theirs, start, strict=True):
        assert (parameter - other).norm() < 0.02 * (other - before).norm()


def test_parameters_without_a_gradient_stay():
    model = build_model(SMALL)
    optimizer = MuonAdamW(model.named_parameters(), weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {"blocks.0.attention.query.weight", "final_norm.weight"}
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained


def test_it_learns():
    model = build_model(SMALL)
    optimizer = MuonAdamW(model.named_parameters(), muon_lr=0.02, adamw_lr=0.01)
    input_ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(input_ids)[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < 3.9 < losses[0]


# The state


def train(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.set_learning_rate(1 / (1 + step))
        set_gradients(list(model.parameters()), step)
        optimizer.step()


def test_a_continuation_from_stored_state_is_bit_equal(tmp_path):
    """Through safetensors, into an optimizer that has already taken other steps."""
    from safetensors.torch import load_file, save_file

    straight = build_model(SMALL)
    train(straight, MuonAdamW(straight.named_parameters(), weight_decay=0.1), 0, 7)

    model = build_model(SMALL)
    optimizer = MuonAdamW(model.named_parameters(), weight_decay=0.1)
    train(model, optimizer, 0, 4)
    save_file({name: tensor.contiguous() for name, tensor in optimizer.tensors().items()}, tmp_path / "optimizer")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    resumed = build_model(SMALL, seed=9)
    other = MuonAdamW(resumed.named_parameters(), weight_decay=0.1)
    train(resumed, other, 20, 22)
    resumed.load_state_dict(weights)
    other.load_tensors(load_file(tmp_path / "optimizer"))
    train(resumed, other, 4, 7)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_state_is_named_after_parameters_and_copied_on_loading():
    model = build_model(SMALL)
    optimizer = MuonAdamW(model.named_parameters())
    train(model, optimizer, 0, 2)
    tensors = optimizer.tensors()
    expected = {"steps_taken"}
    for name, parameter in model.named_parameters():
        muon = name.startswith("blocks.") and parameter.ndim == 2
        expected |= {f"{name}.{buffer}" for buffer in (["momentum_buffer"] if muon else ["exp_avg", "exp_avg_sq"])}
    assert set(tensors) == expected
    stored = {name: tensor.clone() for name, tensor in tensors.items()}
    again = MuonAdamW(model.named_parameters())
    again.load_tensors(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.tensors().items())
    train(model, again, 2, 3)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors.items()), "the stored state changed"
    again.load_tensors({"steps_taken": torch.tensor(5)})
    assert set(again.tensors()) == {"steps_taken"} and again.steps_taken == 5


def test_state_of_another_model_is_refused():
    model = build_model(SMALL)
    optimizer = MuonAdamW(model.named_parameters())
    with pytest.raises(KeyError, match="blocks.9"):
        optimizer.load_tensors({"blocks.9.attention.query.weight.momentum_buffer": torch.zeros(32, 32)})
