"""Accuracies told honestly: confidence intervals, a paired comparison, and what several samples of a problem say."""

import collections
import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)
Z_95 = 1.959963984540054  # two-sided 95% of the normal distribution


def wilson(correct: float, total: float, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval (Wilson 1927) of a proportion: sensible near 0 and 1, unlike the normal one.

    Raises:
        ValueError: `total` is not above 0, or `correct` is not within 0..total.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} is no proportion")
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


def clustered_wilson(clusters: Sequence[tuple[int, int]], z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval for (correct, total) pairs whose items depend on each other, as questions on one document do.

    The number of items is divided by the design effect (Kish 1965): the variance that the clusters show over the one
    that independent items would have, where that is above 1. So the interval is never narrower than `wilson`'s.

    Raises:
        ValueError: there is no item.
    """
    correct, total = sum(right for right, _ in clusters), sum(size for _, size in clusters)
    if total <= 0:
        raise ValueError("an interval needs at least one item")
    share = correct / total
    independent = share * (1 - share) / total
    effect = 1.0
    if independent > 0 and len(clusters) > 1:
        spread = sum((right - share * size) ** 2 for right, size in clusters)
        shown = spread / total**2 * len(clusters) / (len(clusters) - 1)
        effect = max(1.0, shown / independent)
    return wilson(correct / effect, total / effect, z)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of two systems asked the same items (McNemar 1947, by the binomial distribution).

    If both were equally good, an item that only one of them has right would be either's with probability 1/2; p is the
    probability of a split at least as uneven as this one.

    Args:
        only_first: items that the first has right and the second wrong; only_second: the other way round.

    Raises:
        ValueError: a count is below 0.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"{only_first} and {only_second} are no counts of items")
    different = only_first + only_second
    tail = sum(math.comb(different, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**different)


def mean_at_k(correct: Sequence[bool]) -> float:
    """The share of right ones among k samples of one problem: the expected accuracy of one sample."""
    if not correct:
        raise ValueError("a mean needs at least one sample")
    return sum(correct) / len(correct)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k samples is right, without bias, from `correct` of `samples` ones.

    1 - C(samples - correct, k) / C(samples, k), equation 1 of Chen et al. 2021 (https://arxiv.org/abs/2107.03374): the
    share of right draws among all draws of k of these samples.

    Raises:
        ValueError: k is not within 1..samples, or `correct` not within 0..samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} correct of {samples} samples: use k from 1 to the number of samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[T | None]) -> T | None:
    """The answer that most samples give (Wang et al. 2022, self-consistency); None where none gives any.

    A sample without an answer (None) has no vote. Of answers with equally many votes, the one that was the first to
    reach that number wins, so maj@k is a function of the first k samples in their order.
    """
    votes: collections.Counter[T] = collections.Counter()
    winner = None
    for answer in answers:
        if answer is not None:
            votes[answer] += 1
            if winner is None or votes[answer] > votes[winner]:
                winner = answer
    return winner
