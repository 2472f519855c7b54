"""Replies to word problems, marked by every rule, and what they come to: accuracies, intervals, a paired comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from evaluation.answers import RULES, Rule, extract_answer, matches
from evaluation.asking import Reply
from evaluation.intervals import clustered_wilson, majority, mcnemar, mean_at_k, pass_at_k, wilson
from evaluation.problems import Problem


@dataclass(frozen=True)
class Marked:
    """One reply, the answer that each rule finds in it, and whether that is right."""

    reply: Reply
    answers: dict[Rule, Fraction | str | None]
    correct: dict[Rule, bool]


def mark(problem: Problem, reply: Reply) -> Marked:
    """The reply to `problem`, marked."""
    answers = {rule: extract_answer(reply.text, rule) for rule in RULES}
    return Marked(reply, answers, {rule: matches(answers[rule], problem.answer, rule) for rule in RULES})


def scores(marked: Sequence[Marked]) -> dict[Rule, dict[str, Any]]:
    """By rule: how many are right, their share with its 95% interval (Wilson), and the share that gives no answer."""
    found = {}
    for rule in RULES:
        correct, total = sum(each.correct[rule] for each in marked), len(marked)
        low, high = wilson(correct, total)
        without = sum(each.answers[rule] is None for each in marked)
        found[rule] = {"correct": correct, "total": total, "accuracy": correct / total, "low": low, "high": high,
                       "no_answer": without / total}  # fmt: skip
    return found


def finishes(marked: Sequence[Marked]) -> dict[str, float]:
    """The shares of replies that were cut at the most tokens, and of problems that had no room in the context."""
    return {name: sum(each.reply.finish == finish for each in marked) / len(marked)
            for name, finish in (("truncated", "length"), ("no_room", "no_room"))}  # fmt: skip


def sample_scores(problems: Sequence[Problem], marked: Sequence[Sequence[Marked]]) -> dict[Rule, dict[str, Any]]:
    """By rule, of n samples a problem: mean@n with its 95% interval (problems are clusters), and for k = 1, 2, 4 .. n
    pass@k (unbiased) and maj@k (of the first k samples)."""
    n = len(marked[0])
    sizes = sorted({n, *(2**power for power in range(n.bit_length()) if 2**power <= n)})
    found = {}
    for rule in RULES:
        right = [[sample.correct[rule] for sample in samples] for samples in marked]
        low, high = clustered_wilson([(sum(row), n) for row in right])
        found[rule] = {
            f"mean@{n}": _mean([mean_at_k(row) for row in right]), "low": low, "high": high,
            **{f"pass@{k}": _mean([pass_at_k(n, sum(row), k) for row in right]) for k in sizes},
            **{f"maj@{k}": _mean([_majority_is_right(*pair, rule, k) for pair in zip(problems, marked, strict=True)])
               for k in sizes},
        }  # fmt: skip
    return found


def better(states: dict[str, Sequence[Marked]], rule: Rule) -> str:
    """The name of the state with most right answers by `rule`; the first of equals."""
    return max(states, key=lambda name: sum(each.correct[rule] for each in states[name]))


def compared(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Two systems on the same items, in the same order: what only one of them has right, and the exact p (McNemar)."""
    only_first = sum(mine and not other for mine, other in zip(first, second, strict=True))
    only_second = sum(other and not mine for mine, other in zip(first, second, strict=True))
    return {"only_checkpoint": only_first, "only_baseline": only_second, "p": mcnemar(only_first, only_second)}


def _majority_is_right(problem: Problem, samples: Sequence[Marked], rule: Rule, k: int) -> float:
    return float(matches(majority([sample.answers[rule] for sample in samples[:k]]), problem.answer, rule))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
