"""Confidence intervals of accuracies."""

import math
from collections.abc import Sequence

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
