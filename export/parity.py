"""How far the logits of one writer of text are from another's, for all formats alike.

`compare` gives the numbers, `Parity.problems` says which of them are out of bounds. The first of the two writers is the
one that is right.
"""

import dataclasses

import numpy as np

MARGIN = 0.1  # of logits: where the first two of the reference are closer, either may win by a rounding


class NotFinite(ValueError):
    """A model whose logits are no numbers."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a comparison may come to at most, or for top-1 at least. None: not asked."""

    max_abs: float | None = None
    relative: float | None = None
    mean_kl: float | None = None
    max_kl: float | None = None
    top1: float | None = None
    top1_clear: float | None = None


GRAPH = Bounds(relative=1e-4)  # two computations in fp32 of the same weights
ROUNDING = Bounds(mean_kl=1e-4, top1_clear=0.99)  # fp16 against fp32


@dataclasses.dataclass(frozen=True)
class Parity:
    """The logits of two writers over the same positions.

    Attributes:
        positions: how many.
        range: of the reference: its largest logit minus its smallest.
        max_abs: the largest difference; `relative` is that as a part of the range.
        mean_kl, max_kl: of the reference's distribution to the other, in nats.
        top1: the part of positions where both name the same token.
        clear, top1_clear: how many positions have a margin above 0.1 between the reference's first two, and top-1 of
            those; 1 if there are none.
    """

    positions: int
    range: float
    max_abs: float
    relative: float
    mean_kl: float
    max_kl: float
    top1: float
    clear: int
    top1_clear: float

    def problems(self, bounds: Bounds) -> list[str]:
        """What is out of `bounds`, each with its value and the bound; a number that is none is always out of them."""
        found = []
        for field in dataclasses.fields(bounds):
            bound, value = getattr(bounds, field.name), getattr(self, field.name)
            if bound is None:
                continue
            least = field.name.startswith("top1")
            if not (value >= bound if least else value <= bound):
                found.append(f"{field.name} is {value:.3g}, at {'least' if least else 'most'} {bound:g} is right")
        return found


def compare(reference: np.ndarray, other: np.ndarray) -> Parity:
    """Two arrays of logits [..., V] over the same positions.

    Raises:
        NotFinite: a logit of the reference is not.
        ValueError: they are of different shapes, or there are no positions.
    """
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if reference.shape != other.shape or reference.size == 0 or reference.shape[-1] < 2:
        raise ValueError(f"logits of shapes {reference.shape} and {other.shape} cannot be compared")
    if not np.isfinite(reference).all():
        raise NotFinite("a logit is not finite")
    reference, other = reference.reshape(-1, reference.shape[-1]), other.reshape(-1, other.shape[-1])
    with np.errstate(invalid="ignore"):  # what is not finite in `other` comes out as not a number, which is a problem
        logs, others = _log_softmax(reference), _log_softmax(other)
        divergence = (np.exp(logs) * (logs - others)).sum(-1)
        largest = float(np.abs(reference - other).max())
    second, first = np.partition(reference, -2, axis=-1)[:, -2:].T
    same, clear = reference.argmax(-1) == other.argmax(-1), first - second > MARGIN
    extent = float(reference.max() - reference.min())
    return Parity(
        positions=len(reference),
        range=extent,
        max_abs=largest,
        relative=largest / extent if extent else (0.0 if largest == 0 else float("inf")),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        top1=float(same.mean()),
        clear=int(clear.sum()),
        top1_clear=float(same[clear].mean()) if clear.any() else 1.0,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
