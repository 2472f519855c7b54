"""Step-by-step arithmetic word problems of the embedded corpus.

A problem is a chain of one to three operations on a running total that never leaves 0 to MAX_TOTAL. The chain (the
first number, the operations and their numbers) is its essence: a validation problem's arithmetic never occurs in
training, in any wording. The solution repeats each event and works it out on a line of its own, then "#### N".
"""

from collections.abc import Callable
from dataclasses import dataclass

from data.embedded_draw import NAMES, Draw, Split, draw_on_side, pronouns

MAX_TOTAL = 20
MAX_STEPS = 3

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda total, number: total + number,
    "-": lambda total, number: total - number,
    "*": lambda total, number: total * number,
}


@dataclass(frozen=True)
class Chain:
    """A first number and the operations on it, such as 7 (+ 5) (- 3)."""

    first: int
    steps: tuple[tuple[str, int], ...]

    def totals(self) -> list[int]:
        """The running total before and after each step."""
        totals = [self.first]
        for operation, number in self.steps:
            totals.append(OPERATIONS[operation](totals[-1], number))
        return totals


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str
    answer: int
    chain: Chain


@dataclass(frozen=True)
class Scene:
    """Where a chain is told: how it begins, what adds, takes away and multiplies, and what is asked.

    An event is written once and used twice: in the question and, before its equation, in the solution.
    """

    things: tuple[str, ...]
    start: str
    events: dict[str, tuple[str, ...]]
    ask: str


SCENES = (
    Scene(("apples", "shells", "stickers", "coins", "marbles", "books", "pencils", "cards"), "{hero} has {n} {things}.",
          {"+": ("{hero} finds {n} more", "{hero} buys {n} more", "{friend} gives {him} {n} more"),
           "-": ("{hero} gives away {n}", "{hero} loses {n}", "{friend} takes {n} of them"),
           "*": ("{hero} now gets {n} times as many",)},
          "How many {things} does {hero} have now?"),
    Scene(("people", "children"), "A bus starts with {n} {things}.",
          {"+": ("at the school, {n} get on", "at the park, {n} get on"),
           "-": ("at the market, {n} get off", "at the station, {n} get off")},
          "How many {things} are on the bus now?"),
    Scene(("ducks", "frogs", "swans", "birds"), "There are {n} {things} at the pond.",
          {"+": ("then {n} more come", "in the evening {n} join them"),
           "-": ("then {n} go away", "after the rain {n} leave"),
           "*": ("then there are {n} times as many",)},
          "How many {things} are at the pond in the end?"),
    Scene(("cookies", "cakes", "rolls", "muffins"), "{hero} bakes {n} {things}.",
          {"+": ("{friend} brings {n} more", "{hero} bakes {n} more"),
           "-": ("{friend} eats {n}", "{hero} sells {n}", "{n} of them burn"),
           "*": ("{hero} then makes {n} times as many",)},
          "How many {things} are left on the table?"),
    Scene(("dolls", "kites", "drums", "lamps"), "A shop has {n} {things}.",
          {"+": ("a truck brings {n} more", "the owner makes {n} more"),
           "-": ("{hero} buys {n}", "the shop sells {n}", "{n} are broken")},
          "How many {things} does the shop have now?"),
)


def _number(draw: Draw, operation: str, total: int) -> int | None:
    """A number that keeps the total in range, or None where there is none."""
    if operation == "+":
        low, high = 1, min(9, MAX_TOTAL - total)
    elif operation == "-":
        low, high = 1, min(9, total)
    else:
        low, high = 2, min(3, MAX_TOTAL // total if total else 0)
    return draw.between(low, high) if low <= high else None


def _propose(draw: Draw) -> tuple[Scene, Chain]:
    scene = draw.one(SCENES)
    total = first = draw.between(2, 12)
    steps: list[tuple[str, int]] = []
    for _ in range(draw.between(1, MAX_STEPS)):
        kinds = ("+", "+", "-", "-", "*") if "*" in scene.events else ("+", "-")
        operation = draw.one(kinds)
        number = _number(draw, operation, total)
        if number is not None:
            steps.append((operation, number))
            total = OPERATIONS[operation](total, number)
    return scene, Chain(first, tuple(steps))


def essence(proposal: tuple[Scene, Chain]) -> tuple[object, ...]:
    chain = proposal[1]
    return ("problem", chain.first, *(part for step in chain.steps for part in step))


def problem(draw: Draw, split: Split) -> Problem:
    """One problem of the asked split."""
    while True:
        scene, chain = draw_on_side(draw, split, _propose, essence)
        if chain.steps:
            break
    hero, friend = draw.some(NAMES, 2)
    words = {"hero": hero, "friend": friend, "things": draw.one(scene.things)} | pronouns(hero)
    totals = chain.totals()
    asked = [scene.start.format_map(words | {"n": chain.first})]
    worked = [f"Start: {chain.first}."]
    for (operation, number), before, after in zip(chain.steps, totals, totals[1:], strict=False):
        event = draw.one(scene.events[operation]).format_map(words | {"n": number})
        event = event[0].upper() + event[1:]
        asked.append(event + ".")
        worked.append(f"{event}: {before} {operation} {number} = {after}.")
    asked.append(scene.ask.format_map(words))
    worked.append(f"#### {totals[-1]}")
    return Problem(" ".join(asked), "\n".join(worked), totals[-1], chain)
