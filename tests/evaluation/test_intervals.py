"""Wilson's interval has published values and the coverage it promises, also where items depend on each other."""

import random

import pytest

from evaluation.intervals import clustered_wilson, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # the first three from Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_published_values(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_refuses_what_is_no_proportion(correct, total):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(correct, total)


def test_independent_clusters_widen_little_and_dependent_ones_much():
    chance = random.Random(3)
    independent = [(sum(chance.random() < 0.5 for _ in range(20)), 20) for _ in range(50)]
    together = [(20 * (chance.random() < 0.5), 20) for _ in range(50)]

    def width(interval):
        return interval[1] - interval[0]

    correct = sum(right for right, _ in independent)
    assert 1 <= width(clustered_wilson(independent)) / width(wilson(correct, 1000)) < 1.4
    # 50 documents that are all right or all wrong tell as much as 50 questions do
    documents_right = sum(right > 0 for right, _ in together)
    assert width(clustered_wilson(together)) == pytest.approx(width(wilson(documents_right, 50)), rel=0.02)


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_covers_the_truth_about_as_often_as_promised(share):
    chance = random.Random(7)
    hits = 0
    for _ in range(400):
        clusters = []
        for _ in range(40):
            likely = min(1.0, max(0.0, chance.gauss(share, share / 3)))
            clusters.append((sum(chance.random() < likely for _ in range(20)), 20))
        low, high = clustered_wilson(clusters)
        hits += low <= share <= high
    assert hits / 400 > 0.91


def test_all_right_and_all_wrong():
    assert clustered_wilson([(5, 5)] * 4) == wilson(20, 20)
    assert clustered_wilson([(0, 5)] * 4) == wilson(0, 20)
    with pytest.raises(ValueError, match="at least one"):
        clustered_wilson([])
