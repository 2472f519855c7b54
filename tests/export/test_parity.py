"""Two writers' logits compared: the numbers are torch's, and what is out of bounds is said by its name."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from export.parity import GRAPH, ROUNDING, Bounds, compare

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((2, 30, 50)).astype(np.float32) * 4
NEAR = LOGITS + RANDOM.standard_normal(LOGITS.shape).astype(np.float32) * 0.3


def test_the_numbers_are_those_of_torch():
    made = compare(LOGITS, NEAR)
    reference, other = torch.from_numpy(LOGITS).double().flatten(0, 1), torch.from_numpy(NEAR).double().flatten(0, 1)
    divergence = F.kl_div(other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    first = reference.topk(2).values
    same, clear = reference.argmax(-1) == other.argmax(-1), first[:, 0] - first[:, 1] > 0.1
    assert dataclasses.asdict(made) == pytest.approx(
        {
            "positions": 60,
            "range": float(reference.max() - reference.min()),
            "max_abs": float((reference - other).abs().max()),
            "relative": float((reference - other).abs().max() / (reference.max() - reference.min())),
            "mean_kl": float(divergence.mean()),
            "max_kl": float(divergence.max()),
            "top1": float(same.double().mean()),
            "clear": int(clear.sum()),
            "top1_clear": float(same[clear].double().mean()),
        },
        rel=1e-9,
    )
    assert 0.5 < made.top1 < 1 and 0.5 < made.top1_clear < 1 and made.clear < made.positions
    assert made.problems(Bounds()) == []
    assert made.problems(dataclasses.replace(GRAPH, max_abs=0.1)) == [
        f"max_abs is {made.max_abs:.3g}, at most 0.1 is right",
        f"relative is {made.relative:.3g}, at most 0.0001 is right",
    ]
    assert [text.split()[0] for text in made.problems(ROUNDING)] == ["mean_kl", "top1_clear"]


def test_equal_logits_have_no_problems():
    made = compare(LOGITS, LOGITS)
    assert (made.max_abs, made.mean_kl, made.top1, made.top1_clear) == (0, 0, 1, 1)
    assert made.problems(GRAPH) == made.problems(ROUNDING) == []


def test_a_constant_added_to_all_logits_of_a_position_changes_no_distribution():
    made = compare(LOGITS, LOGITS + 3)
    assert made.max_kl == pytest.approx(0, abs=1e-9)
    assert made.problems(ROUNDING) == [] != made.problems(GRAPH)


def test_a_close_race_counts_for_top1_alone():
    reference, other = np.array([[1.0, 1.05, 0], [5, 0, 0]]), np.array([[1.05, 1.0, 0], [5, 0, 0]])
    made = compare(reference, other)
    assert (made.top1, made.clear, made.top1_clear) == (0.5, 1, 1.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_within_bounds(wrong):
    other = LOGITS.copy()
    other[1, 4, 7] = wrong
    assert compare(LOGITS, other).problems(Bounds(relative=1e30))
    assert compare(LOGITS, other).problems(Bounds(mean_kl=1e30))
    with pytest.raises(ValueError, match="a logit is not finite"):
        compare(other, LOGITS)


@pytest.mark.parametrize(("first", "second"), [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((2, 1), (2, 1))])
def test_what_cannot_be_compared_is_refused(first, second):
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(np.zeros(first), np.zeros(second))
