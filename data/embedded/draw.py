"""The chance and the split of the embedded corpus, and the words its three kinds of document share.

Everything drawn comes from `random.Random(str).random()`, the only sequence that Python promises to keep between
versions; choices are built on it here. A document's essence (what makes it that document, whatever its wording) is
hashed, and the hash alone says whether it belongs to training or to validation: the two cannot meet, for any seed.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

Split = Literal["train", "valid"]
SPLITS = ("train", "valid")
VALID_ONE_IN = 10

T = TypeVar("T")

GIRLS = ("Anna", "Mia", "Lily", "Rosa", "Emma", "Zoe", "Nina", "Clara", "Ella", "Ruby", "Sara", "Lucy", "Amy", "Ivy",
         "Nora", "Maya", "Tess", "Jane", "Kate", "Leah", "Molly", "Hana", "Vera", "Wendy")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Noah", "Omar", "Paul", "Ravi", "Hugo", "Dan",
        "Eric", "Luke", "Adam", "Carl", "Ivan", "Jake", "Nick", "Oscar", "Peter", "Kofi")
NAMES = GIRLS + BOYS


class Draw:
    """A stream of choices that is the same on every machine and Python version."""

    def __init__(self, *key: object):
        self._random = random.Random("/".join(str(part) for part in key)).random

    def below(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self._random() * stop)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def one(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in random order."""
        left = list(items)
        if count > len(left):
            raise ValueError(f"cannot draw {count} different items from {len(left)}")
        for place in range(count):
            other = place + self.below(len(left) - place)
            left[place], left[other] = left[other], left[place]
        return left[:count]


def side(*essence: object) -> Split:
    """The split an essence belongs to: one in VALID_ONE_IN is held out."""
    digest = hashlib.sha256("/".join(str(part) for part in essence).encode()).digest()
    return "valid" if int.from_bytes(digest[:8], "big") % VALID_ONE_IN == 0 else "train"


def draw_on_side(draw: Draw, split: Split, propose: Callable[[Draw], T], essence: Callable[[T], Sequence[object]]) -> T:
    """Proposes until the proposal's essence lies on the asked side."""
    while True:
        proposal = propose(draw)
        if side(*essence(proposal)) == split:
            return proposal


def pronouns(name: str) -> dict[str, str]:
    """he/him/his of a name, capitalised under a capital key."""
    words = ("she", "her", "her") if name in GIRLS else ("he", "him", "his")
    small = dict(zip(("he", "him", "his"), words, strict=True))
    return small | {key.capitalize(): word.capitalize() for key, word in small.items()}
