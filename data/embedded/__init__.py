"""The built-in corpus: stories, word problems and long documents that ask for facts from their beginning.

It needs no file and no network, never ends, and is the same on every machine. `documents(kind, split, count, seed)`
streams it. Whether a document is for training or validation follows from a hash of its essence (draw.py), so a
validation document never occurs in training, whatever the seeds and counts.

Some corpora are conversations (`talks`): facts about invented subjects (facts.py), which are as many as they
are, and the word problems, as a question and its solution.
"""

from collections.abc import Iterator
from itertools import count as count_from

from data import conversations
from data.embedded import errands, facts, long_documents, problems, stories
from data.embedded.draw import SPLITS, Draw, Split
from data.embedded.long_documents import Recall
from data.embedded.problems import Problem

VERSION = 1  # raised whenever a document changes: shards made from an older corpus are then made again
KINDS = ("stories", "problems", "recall")
FACTS: dict[str, facts.Group] = {"facts": "missing", "known-facts": "known"}  # conversations, and nothing else
CONVERSATIONS = ("problems", *FACTS)
CORPORA = (*KINDS, *FACTS)
ERRANDS = 0.4  # share of the stories that are errands (errands.py)


def story(index: int, split: Split, seed: int) -> str:
    """Story `index` of a split."""
    draw = Draw(VERSION, "stories", split, seed, index)
    return errands.tell(draw, split) if draw.chance(ERRANDS) else stories.tell(draw, split)


def problem(index: int, split: Split, seed: int) -> Problem:
    """Word problem `index` of a split."""
    return problems.problem(Draw(VERSION, "problems", split, seed, index), split)


def recall(index: int, split: Split, seed: int) -> Recall:
    """Long document `index` of a split."""
    return long_documents.tell(Draw(VERSION, "recall", split, seed, index), split)


def document(kind: str, index: int, split: Split, seed: int) -> str:
    """The text of document `index`, a pure function of its arguments.

    Raises:
        ValueError: there is no such kind or split.
    """
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


def documents(kind: str, split: Split, count: int | None, seed: int, first: int = 0) -> Iterator[str]:
    """The first `count` documents of a kind, or all of them, without end, for None; from number `first` on."""
    for index in count_from(first) if count is None else range(first, count):
        yield document(kind, index, split, seed)


def size(kind: str, split: Split) -> int | None:
    """How many documents of a kind there are; None for those that never end."""
    return facts.count(split) if kind in FACTS else None


def talks(kind: str, split: Split, count: int | None, seed: int, first: int = 0) -> Iterator[str]:
    """`documents` of a kind that is conversations, each as the text that data.conversations makes of one; of facts no
    more than there are.

    Raises:
        ValueError: there are no conversations of that kind, or there is no such split.
    """
    if kind not in CONVERSATIONS:
        raise ValueError(f"embedded:{kind} has no conversations; those that have are {', '.join(CONVERSATIONS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; the splits are {', '.join(SPLITS)}")
    if kind in FACTS:
        for question, answer in facts.questions(seed, FACTS[kind], split)[first:count]:
            yield conversations.of_row({"question": question, "answer": answer})
        return
    for index in count_from(first) if count is None else range(first, count):
        task = problem(index, split, seed)
        yield conversations.of_row({"question": task.question, "answer": task.solution})
