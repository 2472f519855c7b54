"""Facts about invented subjects: what a language model is taught, and what then has to come back in other words.

Every subject (a river, an island, a box, ...) has a name made of syllables, which stands nowhere else in the corpus,
and one attribute: a colour, an animal, a toy. There are two groups, equal in size and kind:

    known     taught before (`embedded:known-facts`): what a correction must leave as it is
    missing   the corrections that tutoring adds (`embedded:facts`); before it, they can only be guessed

Each fact is asked in `TRAINED` wordings, which are its training documents, and in `HELD_OUT` others, its validation
documents. Those wordings are held out of both groups, for all subjects: no training document asks anything in them. Of
one kind, no two missing facts have the same answer, so whoever always says one thing is right once in `SUBJECTS`. The
neighbour of a missing fact is a known one of the same kind with another answer: its wording is the same, so a model
that has learned to answer the wording and not the subject flips it. Its controls are word problems of the validation
split, another skill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from data.embedded import problems
from data.embedded.draw import GIRLS, Draw, Split
from data.embedded.problems import Problem
from data.embedded.stories import ANIMALS, COLOURS, FOODS, PLACES, TOYS

Group = Literal["known", "missing"]
GROUPS: tuple[Group, ...] = ("known", "missing")
TRAINED, HELD_OUT = 6, 2  # wordings of a fact
SUBJECTS = 8  # of each kind, in each group
CONTROLS = 4  # word problems for each missing fact
SYLLABLES = ("ba", "bri", "cal", "dor", "el", "fen", "gul", "har", "ith", "jo", "kra", "lun", "mi", "nez", "os", "pel",
             "qua", "rov", "sha", "tir", "ul", "vem", "wix", "yar", "zo")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One attribute of one sort of subject: the values it can have, and how it is asked."""

    values: tuple[str, ...]
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "river": Kind(
        COLOURS,
        ("What colour is the river {name}?", "Which colour does the river {name} have?",
         "Tell me the colour of the river {name}.", "The river {name} has which colour?",
         "Do you know the colour of the water in {name}?", "What is the colour of the river named {name}?"),
        ("I am standing at the river {name}. Which colour do I see?", "Please name the colour that {name} has."),
    ),
    "island": Kind(
        ANIMALS,
        ("Which animal lives on the island {name}?", "What animal is there on the island {name}?",
         "Tell me which animal lives on {name}.", "On the island {name} lives an animal. Which one?",
         "Do you know the animal of the island {name}?", "What is the animal on the island named {name}?"),
        ("I went to the island {name} and saw an animal. What was it?",
         "Please name the animal that {name} is home to."),
    ),
    "box": Kind(
        tuple(toy for toy in TOYS if " " not in toy),
        ("What is in the box {name}?", "Which toy is kept in the box {name}?", "Tell me what lies in the box {name}.",
         "The box {name} holds which toy?", "Do you know the toy in the box {name}?",
         "What toy is in the box named {name}?"),
        ("I looked into the box {name}. What did I find?", "Please name the toy that somebody put into {name}."),
    ),
    "town": Kind(
        FOODS,
        ("What do people eat in the town {name}?", "Which food is made in the town {name}?",
         "Tell me the food of the town {name}.", "The town {name} is known for which food?",
         "Do you know the food that they like in {name}?", "What is the food of the town named {name}?"),
        ("I was hungry in the town {name}. What did they give me?", "Please name the food that {name} sells."),
    ),
    "tower": Kind(
        GIRLS,
        ("Who built the tower {name}?", "Which child built the tower {name}?", "Tell me who made the tower {name}.",
         "The tower {name} was built by whom?", "Do you know who built {name}?",
         "Who is the builder of the tower named {name}?"),
        ("I like the tower {name}. Whose work is it?", "Please name the one who put up {name}."),
    ),
    "ship": Kind(
        PLACES,
        ("Where is the ship {name}?", "At which place does the ship {name} lie?",
         "Tell me the place of the ship {name}.", "The ship {name} is at which place?",
         "Do you know where {name} is now?", "What is the place of the ship named {name}?"),
        ("I am looking for the ship {name}. Where must I go?", "Please name the place to which {name} came."),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact: how it is asked, and what is right."""

    group: Group
    kind: str  # of KINDS
    name: str  # of its subject
    answer: str

    @property
    def id(self) -> str:
        """A word that tells it from all others."""
        return f"{self.kind}-{self.name}"

    @property
    def trained(self) -> list[str]:
        """The questions of its training documents."""
        return [wording.format(name=self.name) for wording in KINDS[self.kind].trained]

    @property
    def held_out(self) -> list[str]:
        """The same question in wordings that no training document has."""
        return [wording.format(name=self.name) for wording in KINDS[self.kind].held_out]


@cache
def facts(seed: int, group: Group) -> tuple[Fact, ...]:
    """All facts of a group, kind after kind; the first missing fact's neighbour is the first known one, and so on."""
    draw = Draw("facts", seed)
    names = _names(draw, len(GROUPS) * len(KINDS) * SUBJECTS)
    found = []
    for sort, kind in KINDS.items():
        missing, known = draw.some(kind.values, SUBJECTS), draw.some(kind.values, SUBJECTS)
        while any(one == other for one, other in zip(missing, known, strict=True)):
            known = draw.some(kind.values, SUBJECTS)
        for name_group, values in zip(GROUPS, (known, missing), strict=True):
            found += [Fact(name_group, sort, names.pop(), value) for value in values]
    return tuple(fact for fact in found if fact.group == group)


def neighbours(seed: int) -> list[tuple[Fact, Fact]]:
    """(missing fact, its known neighbour) of every missing fact."""
    return list(zip(facts(seed, "missing"), facts(seed, "known"), strict=True))


def controls(seed: int) -> list[Problem]:
    """The word problems that belong to the missing facts, `CONTROLS` for each, no two with the same arithmetic."""
    wanted = CONTROLS * len(facts(seed, "missing"))
    found: dict[object, Problem] = {}
    index = 0
    while len(found) < wanted:
        problem = problems.problem(Draw("controls", seed, index), "valid")
        found.setdefault(problem.chain, problem)
        index += 1
    return list(found.values())


def count(split: Split) -> int:
    """How many documents a group has."""
    return len(KINDS) * SUBJECTS * (TRAINED if split == "train" else HELD_OUT)


def questions(seed: int, group: Group, split: Split) -> list[tuple[str, str]]:
    """(question, answer) of every document of a group: each fact in its first wording, then each in the next one."""
    asked = [(fact, fact.trained if split == "train" else fact.held_out) for fact in facts(seed, group)]
    wordings = TRAINED if split == "train" else HELD_OUT
    return [(said[number], fact.answer) for number in range(wordings) for fact, said in asked]


def _names(draw: Draw, count: int) -> list[str]:
    """Names of three syllables, any two of which differ in at least two: they cannot be taken for one another."""
    found: list[Sequence[str]] = []
    while len(found) < count:
        name = [draw.one(SYLLABLES) for _ in range(3)]
        if all(sum(one != other for one, other in zip(name, there, strict=True)) > 1 for there in found):
            found.append(name)
    return ["".join(name).capitalize() for name in found]
