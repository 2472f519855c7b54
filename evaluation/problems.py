"""Word problems with their answers, from rows of `question` and `answer`; and which of them a run never trained on.

`dev` is a training set's own validation side: the rows whose question hashes there, by the same hash that keeps
conversations out of training (data/preparation/clean.py). It is for choosing; the test set is for one look at the end.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data import conversations, sources
from data.preparation import clean
from evaluation.answers import gold_answer

VALID_FRACTION = 0.05  # where the checkpoint's own config names none
KINDS = ("jsonl", "parquet", "hub")


@dataclass(frozen=True)
class Problem:
    """One question, and the text of its right answer: a number, or a solution that ends with "#### N"."""

    id: str  # place in its source, from 0: what pairs the results of two checkpoints
    question: str
    answer: str

    @property
    def gold(self) -> Fraction:
        """The right number."""
        return gold_answer(self.answer)


def read(source: str, split: sources.Split = "train") -> list[Problem]:
    """Every problem of a source ("jsonl:FILE", "parquet:FILE" or "hub:OWNER/NAME"), in its order.

    Args:
        split: side of a Hub source; files are read whole.

    Raises:
        sources.SourceError: it cannot be read, has no rows, or has one that is no problem: a figure over fewer
            problems than there are would look like one over all.
    """
    if sources.parse(source)[0] not in KINDS:
        raise sources.SourceError(f"{source} has no questions with answers: name a source of {', '.join(KINDS)}")
    found = []
    columns = (sources.documents(source, field, split) for field in ("question", "answer"))
    for row, pair in enumerate(zip(*columns, strict=True)):
        bad = next((value for value in pair if isinstance(value, sources.BadRow)), None)
        if bad is not None:
            raise sources.SourceError(f"{bad.where}: {bad.detail}: a problem has a `question` and an `answer`, both "
                                      "texts")  # fmt: skip
        problem = Problem(str(row), *pair)
        if not problem.question.strip():
            raise sources.SourceError(f"{source}, row {row + 1}: its question is empty")
        try:
            problem.gold  # noqa: B018  asked for its error
        except ValueError as error:
            raise sources.SourceError(f"{source}, row {row + 1}: {error}; its answer ends {pair[1][-40:]!r}") from error
        found.append(problem)
    if not found:
        raise sources.SourceError(f"{source} has no problems")
    return found


def side(question: str, valid_fraction: float) -> str:
    """ "valid" for a question that is held out of training, and so are all answers to it; else "train"."""
    return clean.split_of(clean.normalise(question).strip(), valid_fraction)


def on_side(problems: Iterable[Problem], wanted: str, valid_fraction: float) -> list[Problem]:
    """Those of one side ("train" or "valid"), in their order."""
    return [problem for problem in problems if side(problem.question, valid_fraction) == wanted]


def valid_fraction_of(checkpoint: Path) -> float:
    """The share of its data that the run of a checkpoint (as `checkpoints.locate` gives it) held out."""
    from checkpoints.checkpoint import RUN_CONFIG, read_run_config

    if not (checkpoint / RUN_CONFIG).exists():  # a stock folder
        return VALID_FRACTION
    data = read_run_config(checkpoint).get("data") or {}
    fraction = data.get("valid_fraction") if isinstance(data, dict) else None
    return VALID_FRACTION if fraction is None else float(fraction)


def solution(problem: Problem) -> str:
    """The right solution as a model is trained on it, without GSM8K's calculator marks."""
    row = {"question": problem.question, "answer": problem.answer}
    return conversations.answers_of(conversations.of_row(row))[0]


def digest(problems: Sequence[Problem]) -> str:
    """16 hex digits that tell these problems, in this order, from others."""
    text = "\x1e".join(f"{problem.id}\x1f{problem.question}\x1f{problem.answer}" for problem in problems)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
