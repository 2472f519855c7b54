"""What measurements on one device share: rows that are told and written as they come, turns on its memory, the time
that is left, and that one which fails leaves the others theirs.

Nothing but torch is needed, nor imported before it is.
"""

import contextlib
import gc
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import result

Row = dict[str, Any]


class Findings:
    """What is found section by section, so that whoever ends this too early has at least what there was by then.

    Attributes:
        rows: by section. skipped: what was not measured, with the reason. seconds: by section that has ended.

    Args:
        seconds: in which everything has to be done, from now on; None: it takes as long as it takes.
        record: called whenever something was found.
    """

    def __init__(
        self, device: torch.device, seconds: float | None = None, record: Callable[["Findings"], None] | None = None
    ):
        self.device = device
        self.rows: dict[str, list[Row]] = {}
        self.skipped: list[str] = []
        self.seconds: dict[str, float] = {}
        self._record = record or (lambda _: None)
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._section = ""

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def add(self, row: Row) -> None:
        """One more row of the section that is at work."""
        self.rows.setdefault(self._section, []).append(row)
        told = (f"{key} {result.text(value)}" for key, value in row.items() if value is not None)
        print(f"{self._section}: {', '.join(told)}", flush=True)
        self._record(self)

    def skip(self, reason: str) -> None:
        """What is not measured here, and why."""
        self.skipped.append(reason)
        self._record(self)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Around one section: the rows that come are its own, and it ends where the time does."""
        self._section, began = name, time.monotonic()
        with at_most(self.left(), f"section {name}", self):
            yield
        free()
        self.seconds[name] = round(time.monotonic() - began, 1)
        self._record(self)

    @contextlib.contextmanager
    def measuring(self, **about: Any) -> Iterator[None]:
        """Around one of several measurements, so that the others are made whatever becomes of it: one that does not
        fit the card is skipped, one that fails is a row that does not hold, with the reason."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.skip(f"{', '.join(f'{key} {value}' for key, value in about.items())}: does not fit this card")
        except Exception as error:  # noqa: BLE001  whatever a kernel or its compiler raises
            traceback.print_exc()
            self.add({**about, "error": f"{type(error).__name__}: {str(error).strip()[:300]}", "holds": False})
        free()


@contextlib.contextmanager
def at_most(seconds: float, what: str, findings: Findings) -> Iterator[None]:
    """Interrupts what takes longer, and says so. One may be inside another."""

    def interrupt(*_: object) -> None:
        raise _TooLong

    if seconds == math.inf:
        yield
        return
    before = signal.signal(signal.SIGALRM, interrupt)
    outer, began = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))[0], time.monotonic()
    try:
        yield
    except _TooLong:
        findings.skip(f"{what}: not done in the {seconds:.0f} s that were left")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), 0.001))


class _TooLong(BaseException):
    """No Exception: whatever is interrupted must not take it for a failure of its own."""


def free() -> None:
    """Let go of the last model, and of its compilations, which would count against the next one's."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until `device` has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
