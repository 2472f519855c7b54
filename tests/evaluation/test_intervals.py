"""Intervals have published values and the coverage they promise; what is counted over samples equals brute force."""

import itertools
import random

import pytest

from evaluation.intervals import clustered_wilson, majority, mcnemar, mean_at_k, pass_at_k, wilson


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


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in range(7) for b in range(7)])
def test_mcnemar_counts_all_splits_of_the_items_that_differ(first, second):
    """Every item that only one system has right is tossed to either: how often is the split as uneven as it was?"""
    tosses = list(itertools.product((-1, 1), repeat=first + second))
    uneven = sum(abs(sum(toss)) >= abs(first - second) for toss in tosses)
    assert mcnemar(first, second) == pytest.approx(uneven / len(tosses), abs=1e-12)


def test_mcnemar_of_many_items():
    assert mcnemar(700, 600) == pytest.approx(0.00602, abs=5e-5)  # the normal approximation's: z = 99 / sqrt(1300)
    assert mcnemar(1000, 0) == pytest.approx(2 * 0.5**1000, rel=1e-12)
    with pytest.raises(ValueError, match="no counts"):
        mcnemar(-1, 2)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            pool = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(pool, k))
                expected = sum(map(any, draws)) / len(draws)
                assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)
            assert pass_at_k(samples, correct, 1) == pytest.approx(mean_at_k(pool), abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 2, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_more_than_there_is(samples, correct, k):
    with pytest.raises(ValueError, match="use k from 1"):
        pass_at_k(samples, correct, k)


def test_the_majority_is_the_first_answer_to_reach_the_most_votes():
    """Against the definition, over every sequence of up to 6 of two answers, a third, and none."""

    def by_definition(answers):
        said = [answer for answer in answers if answer is not None]
        most = max(map(said.count, said), default=0)
        for length in range(1, len(answers) + 1):  # the shortest beginning in which somebody has that many
            reached = [answer for answer in set(said) if answers[:length].count(answer) == most]
            if reached:
                return reached[0]
        return None

    for length in range(7):
        for answers in itertools.product((None, "a", "b", "c"), repeat=length):
            assert majority(answers) == by_definition(answers), answers


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_at_k([])
