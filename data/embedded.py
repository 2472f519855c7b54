"""The built-in corpus: stories, word problems and long documents that ask for facts from their beginning.

It needs no file and no network, never ends, and is the same on every machine. `documents(kind, split, count, seed)`
streams it. Whether a document is for training or validation follows from a hash of its essence (embedded_draw.py),
so a validation document never occurs in training, whatever the seeds and counts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_from

from data import embedded_problems, embedded_stories
from data.embedded_draw import NAMES, SPLITS, Draw, Split, draw_on_side
from data.embedded_problems import Problem

VERSION = 1  # raised whenever a document changes: shards made from an older corpus are then made again
KINDS = ("stories", "problems", "recall")

FACTS = 20
# Counted as words and punctuation marks: no byte-level BPE that splits words from punctuation makes fewer tokens.
FILLER_PIECES = (1050, 1300)

RELATIONS = {
    "home": ("{name} lives in the {value}.", "Where does {name} live?",
             ("mill", "castle", "cave", "tower", "tent", "cabin", "hut", "palace", "lighthouse", "inn", "boat", "ship",
              "bakery", "library", "museum", "church", "garage", "attic", "cellar", "barn", "harbour", "desert",
              "island", "jungle")),
    "food": ("{name} likes to eat {value}.", "What does {name} like to eat?",
             ("rice", "corn", "pasta", "salad", "beans", "fish", "pears", "plums", "grapes", "lemons", "nuts", "melon",
              "carrots", "peas", "toast", "butter", "pizza", "cherries", "figs", "peaches", "mushrooms", "potatoes",
              "yogurt", "porridge")),
    "pet": ("{name} has a pet {value}.", "What pet does {name} have?",
            ("goat", "sheep", "camel", "parrot", "lizard", "snake", "fox", "wolf", "bear", "lion", "tiger", "zebra",
             "monkey", "panda", "whale", "shark", "crab", "snail", "spider", "beetle", "donkey", "goose", "hen",
             "moose")),
}


@dataclass(frozen=True)
class Recall:
    """A long document; `answers` are the character spans [start, end) in `text` of the asked-for facts' values."""

    text: str
    answers: list[tuple[int, int]]


def story(index: int, split: Split, seed: int) -> str:
    return embedded_stories.tell(Draw(VERSION, "stories", split, seed, index), split)


def problem(index: int, split: Split, seed: int) -> Problem:
    return embedded_problems.problem(Draw(VERSION, "problems", split, seed, index), split)


def _fact(draw: Draw, name: str, split: Split) -> tuple[str, str, str]:
    """(name, relation, value), where the pairing of name and value lies on the asked side."""

    def propose(source: Draw) -> tuple[str, str, str]:
        relation = source.one(tuple(RELATIONS))
        return name, relation, source.one(RELATIONS[relation][2])

    return draw_on_side(draw, split, propose, lambda fact: ("recall", fact[0], fact[2]))


def recall(index: int, split: Split, seed: int) -> Recall:
    """Facts about people; stories about other people; then a question and its answer for each fact, in new order."""
    draw = Draw(VERSION, "recall", split, seed, index)
    names = draw.some(NAMES, len(NAMES))
    facts = [_fact(draw, name, split) for name in names[:FACTS]]
    text = " ".join(RELATIONS[relation][0].format(name=name, value=value) for name, relation, value in facts)
    pieces, wanted = 0, draw.between(*FILLER_PIECES)
    while pieces < wanted:
        filler = embedded_stories.tell(draw, split, names[FACTS:])
        pieces += len(re.findall(r"\w+|[^\w\s]", filler))
        text += "\n" + filler
    answers = []
    for name, relation, value in draw.some(facts, len(facts)):
        statement, question, _ = RELATIONS[relation]
        text += "\n" + question.format(name=name) + " "
        end = len(text) + statement.format(name=name, value=value).rindex(value) + len(value)
        text += statement.format(name=name, value=value)
        answers.append((end - len(value), end))
    return Recall(text, answers)


def document(kind: str, index: int, split: Split, seed: int) -> str:
    """The text of document `index`, a pure function of its arguments."""
    if kind not in KINDS:
        raise ValueError(f"embedded:{kind} does not exist; the kinds are {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; the splits are {', '.join(SPLITS)}")
    if kind == "stories":
        return story(index, split, seed)
    if kind == "problems":
        task = problem(index, split, seed)
        return task.question + "\n" + task.solution
    return recall(index, split, seed).text


def documents(kind: str, split: Split, count: int | None, seed: int) -> Iterator[str]:
    """The first `count` documents of a kind, or all of them, without end, for None."""
    for index in count_from() if count is None else range(count):
        yield document(kind, index, split, seed)
