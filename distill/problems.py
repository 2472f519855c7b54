"""Problems for a teacher: rows of questions, with or without answers, each known by a hash of its question.

Neither the order of the rows nor the names of the files matter. What is left out is counted with its reason: rows that
are no problems, the `dev` part (the validation side of the question's hash, which nobody is trained on), and problems
that hold a question of an evaluation set.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from data import sources
from data.preparation import clean
from data.preparation.contamination import Questions
from distill import traces
from distill.settings import TRACES, ProblemsSection
from evaluation.answers import gold_answer
from evaluation.problems import side

MOST_IN_EXAMS = 0.1  # share of the problems; with more of them, somebody has named the exam itself
SHORTEST, LONGEST = 30, 1500  # characters of a question that a teacher has written
_ANSWERED = re.compile(r"####|\\boxed|(?im:^\W*(?:answer|solution)\b)")

Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """A question, and what is known of its answer."""

    id: str  # 32 hex digits, from the question alone
    question: str
    answer: str | None = None  # the number, such as "18" or "1/3"; None where it is not known
    solution: str | None = None  # what the source has as its answer, often a human's way to it


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """All problems of a job, by id."""

    problems: list[WordProblem]
    left_out: dict[str, int]  # by reason

    @property
    def digest(self) -> str:
        """sha256 (hex) of what they ask and what is known of their answers."""
        content = [[problem.id, problem.question, problem.answer] for problem in self.problems]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def id_of(question: str) -> str:
    """The id of a normalised question; another hash than the one that decides its side, so that the first so many by id
    are no nearer to the held-out side than others."""
    return clean.key_of(f"problem: {question}").hex()


def number_of(answer: str) -> Fraction | None:
    """The number that an answer gives: behind its "####", or all that it is. None where there is none."""
    try:
        return gold_answer(answer)
    except ValueError:
        return None


def read(section: ProblemsSection, say: Say = print) -> ProblemSet:
    """The problems that a config names.

    Raises:
        sources.SourceError: they cannot be read, there are none, or they are those of an exam.
    """
    left_out: collections.Counter[str] = collections.Counter()
    found: dict[str, WordProblem] = {}
    is_written = section.from_.startswith(TRACES)
    rows = _written(section.from_, left_out) if is_written else _rows(section, left_out, say)
    for question, solution in rows:
        question = clean.normalise(question).strip()
        if not question:
            left_out["empty"] += 1
            continue
        if not section.evaluation_only and side(question, section.valid_fraction) == "valid":
            left_out["dev"] += 1
            continue
        number = None if solution is None else number_of(solution)
        answer = None if number is None else str(number)
        problem = WordProblem(id_of(question), question, answer, solution)
        left_out["duplicate"] += problem.id in found
        # of several answers to one question the same one stays, whichever comes first
        found[problem.id] = min(found.get(problem.id, problem), problem, key=lambda one: one.solution or "")
    if not section.evaluation_only:
        _leave_out_exams(section, found, left_out, may_refuse=not is_written)
    problems = [found[key] for key in sorted(found)]
    if not problems:
        told = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "it is empty"
        raise sources.SourceError(f"problems.from: {section.from_} has no problem that can be used ({told})")
    if unknown := sum(problem.solution is not None and problem.answer is None for problem in problems):
        say(f"WARNING: {unknown:,} of {len(problems):,} answers (column {section.answer!r}) give no number, neither "
            "alone nor behind ####: what the teacher says to them cannot be checked")  # fmt: skip
    left_out["over_count"] = len(problems[section.count :]) if section.count else 0
    return ProblemSet(problems[: section.count], {reason: count for reason, count in left_out.items() if count})


def _rows(section: ProblemsSection, left_out: collections.Counter[str], say: Say) -> Iterator[tuple[str, str | None]]:
    """(question, answer) of the rows that have a question."""
    first: sources.BadRow | None = None
    bad = 0
    fields = [section.question, *([section.answer] if section.answer else [])]
    for question, *answers in _columns("problems.from", section.from_, fields, section.split):
        if isinstance(question, sources.BadRow):
            left_out[question.reason] += question.count
            bad += question.count
            first = first or question
            continue
        answer = answers[0] if answers else None
        if isinstance(answer, sources.BadRow):
            left_out["answers_missing"] += answer.count  # the question stays
            answer = None
        yield question, answer
    if first is not None:
        say(f"WARNING: {bad:,} rows are no problems and stay left out, the first of them {first.where} "
            f"({first.reason}: {first.detail}): mend them, or name the column in problems.question")  # fmt: skip


def _columns(
    key: str, source: str, fields: list[str], split: sources.Split
) -> Iterator[tuple[str | sources.BadRow | None, ...]]:
    """The values of `fields` row by row, with bad rows in their places; errors name the `key` of the config."""
    # The source is read once for each field: in the same order, with one item a row.
    first, *others = (sources.documents(source, field, split) for field in fields)
    with sources.named_by(key):
        yield from zip(first, *(itertools.chain(other, itertools.repeat(None)) for other in others), strict=False)


def _written(source: str, left_out: collections.Counter[str]) -> Iterator[tuple[str, None]]:
    """The questions that a teacher has written, those that are one question and nothing else."""
    try:
        for trace in traces.read(Path(source.removeprefix(TRACES)).expanduser()):
            if reason := _no_question(trace):
                left_out[reason] += 1
            else:
                yield trace["text"], None
    except traces.TraceError as error:
        raise sources.SourceError(f"problems.from: {error}") from error


def _no_question(trace: dict[str, Any]) -> str | None:
    """Why what a teacher wrote is not one question and nothing else."""
    text = trace["text"].strip()
    if trace["finish"] != "stop":
        return "cut"
    if not SHORTEST <= len(text) <= LONGEST:
        return "too_short" if len(text) < SHORTEST else "too_long"
    if _ANSWERED.search(text):
        return "answered"
    return None if text.count("?") == 1 and text.endswith("?") else "not_one_question"


def _leave_out_exams(
    section: ProblemsSection, found: dict[str, WordProblem], left_out: collections.Counter[str], may_refuse: bool
) -> None:
    """Take out of `found` what holds a question of an evaluation set."""
    if not section.evaluation_sets:
        return
    sets: dict[str, list[str]] = {}
    for name, exam in section.evaluation_sets.items():
        rows = _columns(f"problems.evaluation_sets.{name}", exam.from_, [exam.field], exam.split)
        sets[name] = [question for (question,) in rows if isinstance(question, str) and question.strip()]
    if empty := [name for name, texts in sets.items() if not texts]:
        raise sources.SourceError(f"problems.evaluation_sets.{empty[0]} holds no question: name its column in `field`")
    questions = Questions(sets)
    held = {key: name for key, problem in found.items() if (name := questions.held_by(problem.question))}
    if may_refuse and len(held) > MOST_IN_EXAMS * len(found):
        names = ", ".join(sorted(set(held.values())))
        raise sources.SourceError(
            f"problems.from: {len(held):,} of {len(found):,} problems of {section.from_} are in evaluation sets "
            f"({names}): name training problems, or set problems.evaluation_only=true, which marks their traces"
        )
    for key, name in held.items():
        del found[key]
        left_out[f"in_evaluation_{name}"] += 1
