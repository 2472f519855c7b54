"""Long documents of the embedded corpus whose end asks for facts from their beginning.

A day is told in a few sentences: where it was, what toy, which animal, what colour, what food. Then come word problems,
which hold none of these. At the end everything about the day is asked, in another order. In validation documents the
problems fill more than 1,024 tokens; in training documents they are of any length up to that, mostly short, so that
looking back is learned nearby first and carries over.
"""

import re
from dataclasses import dataclass

from data.embedded import problems
from data.embedded.draw import NAMES, Draw, Split, draw_on_side
from data.embedded.stories import ANIMALS, COLOURS, FOODS, PLACES, TOYS

# Counted as words and punctuation marks: no byte-level BPE that splits words from punctuation makes fewer tokens.
LONGEST_FILLER = 1250
VALID_FILLER = 1050  # at least

FACTS = {  # kind: what is said of it, what is asked at the end, and the values it may have; all from the stories
    "place": ("{hero} was at the {}.", "The place was the {}.", PLACES),
    "toy": ("{hero} had a {}.", "The toy was a {}.", tuple(toy for toy in TOYS if " " not in toy)),
    "animal": ("A {} came to {hero}.", "The animal was a {}.", ANIMALS),
    "colour": ("The coat of {hero} was {}.", "The colour was {}.", COLOURS),
    "food": ("{hero} ate some {}.", "The food was {}.", FOODS),
}


@dataclass(frozen=True)
class Recall:
    """A long document; `answers` are the character spans [start, end) in `text` of the asked-for facts' values."""

    text: str
    answers: list[tuple[int, int]]


def tell(draw: Draw, split: Split) -> Recall:
    """One document of the asked split: the child and the facts, all together, are its essence."""
    hero, *values = draw_on_side(draw, split, _propose, lambda found: ("recall", *found))
    day = dict(zip(FACTS, values, strict=True))
    told = (FACTS[kind][0].format(day[kind], hero=hero) for kind in draw.some(tuple(FACTS), len(FACTS)))
    text = "One day to remember. " + " ".join(told)
    if split == "valid":
        wanted = draw.between(VALID_FILLER, LONGEST_FILLER)
    else:
        wanted = draw.between(0, draw.between(0, draw.between(0, LONGEST_FILLER)))
    pieces = 0
    while pieces < wanted:
        problem = problems.problem(draw, split)
        text += f"\n{problem.question}\n{problem.solution}"
        pieces += len(re.findall(r"\w+|[^\w\s]", problem.question + problem.solution))
    text += f"\nWhat was it like on the day of {hero}?"
    answers = []
    for kind in draw.some(tuple(FACTS), len(FACTS)):
        start = len(text) + 1 + FACTS[kind][1].index("{}")
        text += " " + FACTS[kind][1].format(day[kind])
        answers.append((start, start + len(day[kind])))
    return Recall(text, answers)


def _propose(draw: Draw) -> tuple[str, ...]:
    return (draw.one(NAMES), *(draw.one(values) for _, _, values in FACTS.values()))
