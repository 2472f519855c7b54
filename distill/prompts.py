"""What a teacher is asked: a problem -> the messages of one request.

    solve   the question alone, after example turns (problems with human solutions) where the config asks for some
    write   some problems are shown, one new one is asked for
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from data import conversations
from distill.problems import WordProblem
from distill.settings import PromptSection
from evaluation.answers import extract_answer
from settings import ConfigError, Problem
from tokenizer.conversations import Message

WRITE = (
    "Here are {count} math word problems:\n\n{problems}\n\nWrite one new problem in their style, about other people "
    "and things and with other numbers. It asks one question, whose answer is one number, and needs a few steps. Write "
    "the problem alone, without its answer."
)
# Of an example's solution: short, and yet more than one step, with an equation in each line but the last, "#### N".
EXAMPLE_LINES, EXAMPLE_CHARACTERS = range(3, 6), 160


class Prompts:
    """The requests of one job.

    Raises:
        ConfigError: there are too few problems for what the config asks for.
    """

    def __init__(self, section: PromptSection, problems: Sequence[WordProblem]):
        self._section, self._problems = section, problems
        # one more than are shown: an example is not its own
        self._examples = _examples(problems, section.examples + 1) if section.examples else []
        if section.task == "write" and len(problems) < section.shown:
            remedy = f"use at most {len(problems)}, there are no more problems"
            raise ConfigError([Problem("prompt.shown", section.shown, remedy)])

    def about(self) -> dict[str, Any]:
        """All that decides the requests, but for the problems."""
        about: dict[str, Any] = {"task": self._section.task, "system": self._section.system}
        if self._section.task == "write":
            return {**about, "request": WRITE, "shown": self._section.shown}
        return {**about, "examples": [[one.question, _cleaned(one)] for one in self._examples]}

    def messages(self, problem: WordProblem, seed: int) -> list[Message]:
        """The request about `problem` with the key's seed."""
        turns = [] if self._section.system is None else [_said("system", self._section.system)]
        if self._section.task == "write":
            shown = "\n\n".join(one.question for one in self._shown(problem, seed))
            return [*turns, _said("user", WRITE.format(count=self._section.shown, problems=shown))]
        for example in [one for one in self._examples if one != problem][: self._section.examples]:
            turns += [_said("user", example.question), _said("assistant", _cleaned(example))]
        return [*turns, _said("user", problem.question)]

    def _shown(self, problem: WordProblem, seed: int) -> list[WordProblem]:
        """The key's own problem, so that each is shown as often as any, and others as its seed draws them."""
        shown, draw = [problem], 0
        while len(shown) < self._section.shown:
            digest = hashlib.blake2b(f"{seed} {draw}".encode(), digest_size=8).digest()
            other = self._problems[int.from_bytes(digest, "big") % len(self._problems)]
            draw += 1
            if other not in shown:
                shown.append(other)
        return shown


def _examples(problems: Sequence[WordProblem], count: int) -> list[WordProblem]:
    """Those of the lowest ids, hence a fair choice in any order, whose solutions are fit to be examples."""
    found = [example for example, _ in zip(filter(_is_example, problems), range(count), strict=False)]
    if len(found) < count:
        fit = (f"of {len(problems):,} problems {len(found)} can be examples (solved in {EXAMPLE_LINES.start} to "
               f"{EXAMPLE_LINES.stop - 1} short lines, an equation each, that end with #### N), and none is its own")
        raise ConfigError([Problem("prompt.examples", count - 1, f"use {max(0, len(found) - 1)}: {fit}")])
    return found


def _is_example(problem: WordProblem) -> bool:
    if problem.solution is None or extract_answer(problem.solution) is None:
        return False
    solution = _cleaned(problem)
    *steps, _ = lines = solution.splitlines()
    is_short = len(lines) in EXAMPLE_LINES and len(solution) <= EXAMPLE_CHARACTERS
    return is_short and all("=" in step for step in steps)


def _cleaned(problem: WordProblem) -> str:
    """The solution as a student would be taught it, without GSM8K's marks for a calculator."""
    row = {"question": problem.question, "answer": problem.solution}
    return conversations.answers_of(conversations.of_row(row))[0]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
