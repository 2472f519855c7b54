"""Which traces a student learns from: one reason a row, the first that holds, so that the counts add up.

Solutions, in this order:

    cut                 the teacher was stopped before it had ended
    refused             the server would not answer
    no_answer           no line is exactly "#### N" (evaluation.answers, the strict rule)
    wrong               another answer than the right one, or than the majority's where no right one is known
    no_majority         none is known, and fewer than two samples, or no more than half of those that answer, agree
    markup loops script what distill.faults finds, in this order
    too_long            more tokens than the student is given
    in_evaluation_NAME  the question or the trace holds a question of an evaluation set, as it is, with other numbers,
                        or half of its 8-grams (data.preparation.contamination)
    same_equations      the same equations in the same order as a shorter trace for the same problem; of traces without
                        equations, the same words
    over_quota          as many others are kept for the problem
    kept

With `any_answer`, for what a student wrote itself and a teacher will score (docs/on-policy.md), right and wrong answers
stay alike, ended or not, loops and repetitions too, for these are what it has to unlearn: refused, no_answer (nothing
was said), markup, too_long, in_evaluation_NAME, kept.

New questions (`task: write`): cut, refused, markup, not_one_question (one "?", at the end, and nothing before or behind
the question), few_numbers (at least two), loops, script, too_long, in_evaluation_NAME, near_duplicate (of a problem
that the teacher was shown, or of an earlier question; numbers do not count), kept.
"""

import collections
import dataclasses
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from data.preparation import clean, near_duplicates
from data.preparation.contamination import Questions, masked_words
from data.preparation.words import words_of
from distill import faults
from distill.problems import number_of
from evaluation.answers import extract_answer

KEPT = "kept"
_FORM = {
    "solve": ("no_answer", "wrong", "no_majority", "markup"),
    "write": ("markup", "not_one_question", "few_numbers"),
}
_CHOICE = {"solve": ("same_equations", "over_quota"), "write": ("near_duplicate",)}
NOT_RIGHT = ("cut", "refused", "no_answer", "wrong", "no_majority")
LIKE = 0.7  # Jaccard similarity of 5-word shingles, numbers masked, from which on a question is not new
_LABEL = re.compile(r"^[\s*#_]*(?:(?:new |math |word )*(?:problem|question))[\s*_]*:[\s*_]*", re.IGNORECASE)
_UNFINISHED = {"length": "cut", "refused": "refused"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a student can use: at most so many traces a problem, of so many of the teacher's tokens."""

    per_problem: int = 4
    max_tokens: int | None = None
    any_answer: bool = False  # whether it is right, and how many there are of a problem, does not matter

    def described(self) -> dict[str, Any]:
        """For what a dataset tells of itself; what is only said of some leaves the others as they were."""
        told = dataclasses.asdict(self)
        return told if self.any_answer else {key: value for key, value in told.items() if key != "any_answer"}


class Decision(NamedTuple):
    """What becomes of a trace, and the answer that it was held against, if there is one."""

    reason: str
    answer: str | None = None


def order(task: str, evaluation_sets: Iterable[str]) -> list[str]:
    """All reasons that a trace can get, in their order."""
    exams = [f"in_evaluation_{name}" for name in evaluation_sets]
    return ["cut", "refused", *_FORM[task], "loops", "script", "too_long", *exams, *_CHOICE[task], KEPT]


def question_of(row: Mapping[str, Any]) -> str:
    """The question of a trace as a student sees it."""
    return clean.normalise(row["question"]).strip()


def new_question(text: str) -> str:
    """What a teacher wrote as a new question, without a label or quotation marks around it."""
    text = _LABEL.sub("", clean.normalise(text).strip(), count=1).strip()
    return text[1:-1].strip() if len(text) > 1 and (text[0], text[-1]) in {('"', '"'), ("“", "”")} else text


# solutions


@dataclasses.dataclass(slots=True)
class _Judged:
    """All that has to be remembered of a trace."""

    problem: bytes
    gold: Fraction | None
    answer: Fraction | None
    tokens: int
    reason: str | None  # why it is not even compared
    fault: str | None  # why it is not kept though it may be right
    path: tuple[str, ...]


def choose_solutions(rows: Iterable[Mapping[str, Any]], options: Options, exams: Questions) -> list[Decision]:
    """The decision on each trace, in the order of `rows`.

    Raises:
        ValueError: an answer that is said to be right is no number.
    """
    questions: dict[bytes, str | None] = {}  # of each, why none of its traces is kept
    judged = [_judge(row, options, exams, questions) for row in rows]
    if options.any_answer:
        return [Decision(one.reason or one.fault or KEPT, None if one.gold is None else str(one.gold))
                for one in judged]  # fmt: skip
    problems: dict[bytes, list[int]] = collections.defaultdict(list)
    for number, one in enumerate(judged):
        problems[one.problem].append(number)
    decisions: list[Decision] = [Decision(KEPT)] * len(judged)
    for numbers in problems.values():
        majority = _majority([judged[number].answer for number in numbers if judged[number].reason is None])
        for number in numbers:
            decisions[number] = _compared(judged[number], majority)
        _thin_out(numbers, judged, decisions, options.per_problem)
    return decisions


def _judge(
    row: Mapping[str, Any], options: Options, exams: Questions, questions: dict[bytes, str | None]
) -> _Judged:
    """A trace by itself."""
    text, question = row["text"], question_of(row)
    problem = clean.key_of(question)
    if problem not in questions:
        name = exams.held_by(question)
        questions[problem] = "markup" if faults.has_marks(question) else f"in_evaluation_{name}" if name else None
    reason = None if options.any_answer and row["finish"] == "length" else _UNFINISHED.get(row["finish"])
    answer = extract_answer(text) if reason is None and not options.any_answer else None
    if reason is None and (not text.strip() if options.any_answer else answer is None):
        reason = "no_answer"
    fault, path = None, ()
    if reason is None:
        fault = _fault(text, question, row["tokens"], options, exams, questions[problem])
        path = faults.equations(text) or tuple(words_of(text.lower())) if fault is None else ()
    return _Judged(problem, _gold(row), answer, row["tokens"], reason, fault, path)


def _gold(row: Mapping[str, Any]) -> Fraction | None:
    if row["answer"] is None:
        return None
    try:
        return Fraction(row["answer"])
    except (ValueError, ZeroDivisionError):
        found = number_of(row["answer"])
        if found is None:
            raise ValueError(f"the answer {row['answer']!r} of problem {row['id']} is no number") from None
        return found


def _fault(
    text: str, question: str, tokens: int, options: Options, exams: Questions, of_question: str | None
) -> str | None:
    """What is wrong with a text for this question, first things first."""
    if of_question == "markup" or faults.has_marks(text) or faults.opens_a_turn(text):
        return "markup"
    if not options.any_answer and faults.has_loops(text):
        return "loops"
    if not options.any_answer and faults.has_foreign_letters(text, question):
        return "script"
    if options.max_tokens is not None and tokens > options.max_tokens:
        return "too_long"
    if of_question is not None:
        return of_question
    name = exams.held_by(text)
    return f"in_evaluation_{name}" if name else None


def _majority(answers: Sequence[Fraction | None]) -> Fraction | None:
    """The answer of more than half of `answers`, if two agree on it at least."""
    counted = collections.Counter(answers).most_common(1)
    return counted[0][0] if counted and counted[0][1] >= 2 and 2 * counted[0][1] > len(answers) else None


def _compared(one: _Judged, majority: Fraction | None) -> Decision:
    right = one.gold if one.gold is not None else majority
    told = None if right is None else str(right)
    if one.reason is not None:
        return Decision(one.reason, told)
    if right is None:
        return Decision("no_majority")
    return Decision("wrong" if one.answer != right else one.fault or KEPT, told)


def _thin_out(numbers: list[int], judged: list[_Judged], decisions: list[Decision], most: int) -> None:
    """Among the traces for one problem, keep one of each path of reasoning, and of these at most `most`: the shortest
    first, and then whatever is best by shortness and by distance from all that are kept, both between 0 and 1
    (maximal marginal relevance, Carbonell & Goldstein 1998)."""
    left: dict[tuple[str, ...], int] = {}
    for number in sorted(numbers, key=lambda number: (judged[number].tokens, number)):
        if decisions[number].reason == KEPT and left.setdefault(judged[number].path, number) != number:
            decisions[number] = decisions[number]._replace(reason="same_equations")
    waiting = [(judged[number].tokens, number, set(path)) for path, number in left.items()]
    longest = max((tokens for tokens, _, _ in waiting), default=0) or 1
    kept: list[set[str]] = []
    while waiting and len(kept) < most:
        best = min(waiting, key=lambda one: (one[0] / longest - _distance(one[2], kept), *one[:2]))
        waiting.remove(best)
        kept.append(best[2])
    for _, number, _ in waiting:
        decisions[number] = decisions[number]._replace(reason="over_quota")


def _distance(steps: set[str], kept: list[set[str]]) -> float:
    """The least Jaccard distance from one of `kept`; 0 where there is none."""
    return min((1 - len(steps & other) / (len(steps | other) or 1) for other in kept), default=0.0)


# new questions


def choose_questions(
    rows: Iterable[Mapping[str, Any]], options: Options, exams: Questions, shown: Iterable[str] = ()
) -> list[Decision]:
    """The decision on each new question, in the order of `rows`; `shown` are further problems that it must not be."""
    seeds = {clean.normalise(question).strip() for question in shown}
    reasons: list[str | None] = []
    texts: list[str] = []
    for row in rows:
        seeds.add(question_of(row))
        text = new_question(row["text"])
        reasons.append(_UNFINISHED.get(row["finish"]) or _malformed(text, row, options, exams))
        if reasons[-1] is None:
            texts.append(text)
    is_new = _new_ones(sorted(seeds), texts)
    news = iter(is_new)
    return [Decision(reason or (KEPT if next(news) else "near_duplicate")) for reason in reasons]


def _malformed(text: str, row: Mapping[str, Any], options: Options, exams: Questions) -> str | None:
    held = exams.held_by(text)
    fault = _fault(text, question_of(row), row["tokens"], options, exams, f"in_evaluation_{held}" if held else None)
    if fault == "markup":
        return fault
    if text.count("?") != 1 or not text.endswith("?") or "####" in text or re.search(r":[ \t*]*\n", text):
        return "not_one_question"
    return "few_numbers" if masked_words(text).count("0") < 2 else fault


def _new_ones(seeds: list[str], texts: list[str]) -> list[bool]:
    """Whether each of `texts` is like none of `seeds` and like no new one before it."""
    everything = near_duplicates.shingles([" ".join(masked_words(text)) for text in [*seeds, *texts]])
    with sqlite3.connect(":memory:") as database:
        index = near_duplicates.Index(database, LIKE)
        taken = [index.add(*one) for one in zip(near_duplicates.bands(everything), everything, strict=True)]
    return taken[len(seeds) :]


