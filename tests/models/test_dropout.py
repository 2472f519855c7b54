"""Dropout's masks: even, independent, and a function of the sample alone."""

import dataclasses

import pytest
import torch

from data.loader import Batch
from models import ModelConfig, build_model
from models.dropout import Dropout
from training.objectives import NextToken

SHAPE = torch.Size((6, 128, 256))
SEEDS = torch.tensor([0, 1, 2**40, 2**40 + 1, -5, 2**63 - 1])
CONFIG = ModelConfig(vocab_size=61, context=48, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=8,
                     global_every=3, dropout=0.2)  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_is_kept_and_so_is_the_mean(rate):
    dropout = Dropout.of(SEEDS, rate)
    shares = dropout.kept(SHAPE, 3).float().mean(dim=(1, 2))
    error = 5 * (rate * (1 - rate) / SHAPE[1:].numel()) ** 0.5
    assert (shares - (1 - rate)).abs().max() < error
    x = torch.ones(SHAPE)
    assert dropout(x, 3).unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])


def test_samples_places_and_neighbours_are_independent():
    """Any two masks, and a mask and itself moved by one, agree as often as chance would have it."""
    dropout = Dropout.of(SEEDS, 0.3)
    masks = [*dropout.kept(SHAPE, 0), *dropout.kept(SHAPE, 1), *dropout.kept(SHAPE, 2)]
    masks += [masks[0].roll(1, dims=0), masks[0].roll(1, dims=1)]
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert float((one & other).float().mean()) == pytest.approx(0.49, abs=0.02)


def test_a_samples_mask_does_not_depend_on_its_batch():
    whole = Dropout.of(SEEDS, 0.3).kept(SHAPE, 7)
    for row in range(6):
        assert torch.equal(Dropout.of(SEEDS[row : row + 1], 0.3).kept(SHAPE[:0] + (1, *SHAPE[1:]), 7)[0], whole[row])


def loss_and_gradients(config, rows, seeds, parts):
    """The summed loss over `rows`, cut into `parts` micro-batches, and its gradients."""
    objective = NextToken(build_model(config)).train()
    total = torch.zeros(())
    for ids, part in zip(rows.chunk(parts), seeds.chunk(parts), strict=True):
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]), part, part)
        loss, _, _ = objective(batch)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in objective.named_parameters()}


def test_the_cut_into_micro_batches_changes_nothing_and_the_sample_does():
    rows = torch.randint(61, (4, 49), generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([5, 6, 7, 8])
    one, gradients = loss_and_gradients(CONFIG, rows, seeds, 1)
    four, others = loss_and_gradients(CONFIG, rows, seeds, 4)
    torch.testing.assert_close(one, four)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-5)
    assert abs(float(one - loss_and_gradients(CONFIG, rows, seeds + 1, 1)[0])) > 1e-3
    without = dataclasses.replace(CONFIG, dropout=0.0)
    assert abs(float(one - loss_and_gradients(without, rows, seeds, 1)[0])) > 1e-3


def test_recomputation_drops_the_same():
    rows = torch.randint(61, (2, 49), generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([5, 6])
    one, gradients = loss_and_gradients(CONFIG, rows, seeds, 1)
    again, others = loss_and_gradients(dataclasses.replace(CONFIG, gradient_checkpointing=True), rows, seeds, 1)
    assert torch.equal(one, again)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_evaluation_drops_nothing():
    rows = torch.randint(61, (2, 48), generator=torch.Generator().manual_seed(0))
    model = build_model(CONFIG).eval()
    seeds = torch.tensor([1, 2])
    assert torch.equal(model.hidden_states(rows, None, seeds), model.hidden_states(rows))
    assert not torch.equal(model.train().hidden_states(rows, None, seeds), model.hidden_states(rows))
