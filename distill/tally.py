"""What the chunks of a job add up to: tokens, right answers, money; and what the rest will take.

Every process reads this from the chunks' about.json, those of others included, so that nobody has to talk.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from evaluation.answers import is_correct
from observe.units import UNKNOWN, compact, duration


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What about.json says of a chunk's rows. `correct`: by the strict rule, of those whose answer is known."""
    known = [row for row in rows if row["answer"] is not None]
    return {
        "keys": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "refused": sum(row["finish"] == "refused" for row in rows),
        "stopped": sum(row["finish"] == "stop" for row in rows),
        "known": len(known),
        "correct": sum(row["finish"] == "stop" and is_correct(row["text"], Fraction(row["answer"])) for row in known),
    }


COUNTED = ("keys", "tokens", "refused", "known", "correct")


@dataclasses.dataclass(frozen=True)
class Tally:
    """Sums over chunks."""

    chunks: int = 0
    keys: int = 0
    tokens: int = 0
    refused: int = 0
    known: int = 0
    correct: int = 0
    usd: float | None = None  # of the chunks whose price is known

    @staticmethod
    def of(chunks: Iterable[dict[str, Any]]) -> "Tally":
        """The sums of what is said of each chunk."""
        chunks = list(chunks)
        prices = [chunk["usd"] for chunk in chunks if chunk.get("usd") is not None]
        sums = {name: sum(chunk.get(name, 0) for chunk in chunks) for name in COUNTED}
        return Tally(len(chunks), **sums, usd=sum(prices) if prices else None)

    @property
    def acceptance(self) -> str:
        """The right ones of those that can be checked, for people."""
        return f"{self.correct / self.known:.0%} of {self.known:,} right" if self.known else f"right {UNKNOWN}"


def line(name: str, tally: Tally, total: int, pace: float | None, seconds_left: float | None) -> str:
    """The progress line: chunks, traces, tokens/s of all processes, acceptance, time to come, money so far."""
    parts = [f"{name}: {tally.chunks}/{total} chunks", f"{tally.keys:,} traces", f"{compact(pace)} tok/s",
             tally.acceptance, f"eta {duration(seconds_left)}"]  # fmt: skip
    return "  ".join([*parts, *([] if tally.usd is None else [f"${tally.usd:,.2f} so far"])])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What chunks that are not there yet will take on this machine; `plus_minus` is two standard errors of the mean of
    the chunks that were measured."""

    hours: float
    plus_minus: float  # hours
    usd_per_hour: float | None

    @staticmethod
    def of(seconds: Sequence[float], left: int, processes: int, usd_per_hour: float | None) -> "Estimate":
        """From the seconds that chunks took, one process each, to `left` more of them on `processes`."""
        hours = left / processes / 3600
        error = statistics.stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else statistics.mean(seconds)
        return Estimate(statistics.mean(seconds) * hours, 2 * error * hours, usd_per_hour)

    def __str__(self) -> str:
        times, unit = (1, "hours") if self.hours >= 0.1 else (60, "minutes")
        told = f"{self.hours * times:.2f} ± {self.plus_minus * times:.2f} {unit}"
        if self.usd_per_hour is None:
            return f"{told} (dollars: set job.usd_per_hour)"
        return f"{told}, ${self.hours * self.usd_per_hour:.2f} ± {self.plus_minus * self.usd_per_hour:.2f}"
