"""Step-by-step arithmetic word problems of the embedded corpus.

A problem is a chain of one to three additions and subtractions on a running total that never leaves 0 to MAX_TOTAL. The
chain (the first number, the operations and their numbers) is its essence: a validation problem's arithmetic never
occurs in training, in any wording. The solution takes up each sentence again and works it out on a line of its own,
then "#### N".
"""

from dataclasses import dataclass

from data.embedded.draw import NAMES, Draw, Split, draw_on_side

MAX_TOTAL = 9
MAX_STEPS = 3
ORDER = ("Then", "Next", "Last")  # which step a sentence tells; its solution begins with the same word


@dataclass(frozen=True)
class Chain:
    """A first number and the steps from it: 7 (+ 2) (- 3) is Chain(7, (2, -3))."""

    first: int
    steps: tuple[int, ...]

    def totals(self) -> list[int]:
        """The running total before and after each step."""
        totals = [self.first]
        for step in self.steps:
            totals.append(totals[-1] + step)
        return totals


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution ending in "#### N", and N."""

    question: str
    solution: str
    answer: int
    chain: Chain


@dataclass(frozen=True)
class Scene:
    """Where a chain is told: who has what, and what adds and takes away."""

    things: tuple[str, ...]
    start: str
    gain: tuple[str, ...]
    loss: tuple[str, ...]
    ask: str


SCENES = (
    Scene(("apples", "shells", "stickers", "coins", "marbles", "stamps", "pencils", "cards"), "{hero} has {n} {things}",
          ("{hero} finds {n}", "{hero} buys {n}", "{hero} wins {n}"),
          ("{hero} gives away {n}", "{hero} loses {n}", "{hero} sells {n}"), "How many {things} does {hero} have?"),
    Scene(("rolls", "muffins", "biscuits", "cookies"), "{hero} bakes {n} {things}",
          ("{hero} bakes {n}", "{hero} makes {n}"), ("{hero} eats {n}", "{hero} burns {n}", "{hero} drops {n}"),
          "How many {things} are left?"),
    Scene(("people", "children"), "the bus has {n} {things}",
          ("the bus picks up {n}", "the bus takes in {n}"), ("the bus lets out {n}", "the bus loses {n}"),
          "How many {things} are on the bus?"),
)  # fmt: skip


def problem(draw: Draw, split: Split) -> Problem:
    """One problem of the asked split."""
    chain = draw_on_side(draw, split, _propose, lambda c: ("problem", c.first, *c.steps))
    scene = draw.one(SCENES)
    words = {"hero": draw.one(NAMES), "things": draw.one(scene.things)}
    opening = "First " + scene.start.format_map(words | {"n": chain.first}) + "."
    asked, worked = [opening], [opening]
    totals = chain.totals()
    orders = ORDER[-len(chain.steps) :]
    for order, step, before, after in zip(orders, chain.steps, totals, totals[1:], strict=False):
        event = draw.one(scene.gain if step > 0 else scene.loss).format_map(words | {"n": abs(step)})
        asked.append(f"{order} {event}.")
        worked.append(f"{order} {event}: {before} {'+' if step > 0 else '-'} {abs(step)} = {after}.")
    asked.append(scene.ask.format_map(words))
    return Problem(" ".join(asked), "\n".join([*worked, f"#### {totals[-1]}"]), totals[-1], chain)


def _propose(draw: Draw) -> Chain:
    total = first = draw.between(2, MAX_TOTAL)
    steps: list[int] = []
    for _ in range(draw.between(1, MAX_STEPS)):
        up = total == 0 or (total < MAX_TOTAL and draw.chance(0.5))
        step = draw.between(1, MAX_TOTAL - total) if up else -draw.between(1, total)
        steps.append(step)
        total += step
    return Chain(first, tuple(steps))
