"""What the outside world asks of a running process: stop, save, or end at once.

    SIGTERM, SIGINT    once: save and stop (exit code 75); again, a moment later: end at once (128 + number)
    SIGHUP             save and stop: the terminal was closed, or ssh has lost its connection (not under nohup)
    the launcher ends  save and stop (machine.process.end_with_launcher)
    run.max_minutes    save and stop, when so much time has passed since this process began
    run.deadline       save and stop, when that moment has come
    SIGUSR1            save and go on

A signal only raises a flag. Who acts on it asks all ranks first (`Strategy.sum`), so that they stop and save at the
same step. Where nothing is lost by being cut off, as while the data is prepared, `interruptible` makes the first
signal a KeyboardInterrupt.
"""

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from machine.process import LAUNCHER_GONE

# A launcher passes on the Ctrl-C that its processes have seen as well: what comes so soon is the same request.
SAME_REQUEST = 1.0  # seconds
AT_ONCE = "asked a second time: ending at once; what was saved stands"
INSISTENT = (signal.SIGTERM, signal.SIGINT)  # by which a person, or a box that is taken away, says it again


class Stopped(Exception):
    """Asked to stop, and all ranks agree."""


class Requests:
    """The requests made of this process so far; makes itself the handler of the signals above."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self.reason = ""  # why it is to stop: a signal's name, the key of the config that says so, or launcher
        self.told = ""  # the same for people
        self.before_end: Callable[[int], None] = lambda number: None  # called with the signal that ends it at once
        self._limit = ("", "")  # `reason` and `told` of the time that runs out first
        self._since = 0.0
        self._interruptible = False
        stops = [*INSISTENT, signal.SIGALRM, LAUNCHER_GONE]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            stops.append(signal.SIGHUP)
        handlers = {**dict.fromkeys(stops, self._stop), signal.SIGUSR1: self._save}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    @contextlib.contextmanager
    def limited(self, max_minutes: float | None, deadline: datetime.datetime | None = None) -> Iterator[None]:
        """Inside, a request to stop comes after so many minutes, or at the deadline (aware), at once where that is
        over; None: it does not."""
        limits = []
        if max_minutes is not None:
            limits.append((60 * max_minutes, "run.max_minutes", f"run.max_minutes={max_minutes} are over"))
        if deadline is not None:
            left = deadline.timestamp() - time.time()
            limits.append((left, "run.deadline", f"run.deadline={deadline:%Y-%m-%dT%H:%M:%SZ} is over"))
        if limits:
            seconds, *self._limit = min(limits)
            signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-6), 1e9))  # 0 would be none; a timer has a most
        try:
            yield
        finally:
            if limits:
                signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def way_on(self) -> str:
        """After a stop that was asked for: why, and what goes on from there."""
        if self.reason == "run.deadline":
            return f"{self.told}: a later one, or null, goes on from there"
        because = f"{self.told}: " if self.told else ""
        return f"{because}the same command goes on from there"

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a request to stop is a KeyboardInterrupt."""
        self._interruptible = True
        try:
            if self.stop:
                raise KeyboardInterrupt
            yield
        finally:
            self._interruptible = False

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def saved(self) -> None:
        """The requested save is made."""
        self.save = False

    def _stop(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.stop:
            if number in INSISTENT and now - self._since > SAME_REQUEST:
                _say(AT_ONCE)
                with contextlib.suppress(Exception):  # nothing may keep it from ending
                    self.before_end(number)
                os._exit(128 + number)
            return
        self.stop, self._since = True, now
        others = {signal.SIGALRM: self._limit, LAUNCHER_GONE: ("launcher", "the launcher has ended")}
        name = signal.Signals(number).name
        self.reason, self.told = others.get(number, (name, name))
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt
        _say(f"{self.told}: stopping at the next step, and saving")

    def _save(self, _number: int, _frame: Any) -> None:
        self.save = True


def _say(text: str) -> None:
    """From one of the processes, in a signal's handler: past Python's buffers, which may be in use just now."""
    if os.environ.get("RANK", "0") == "0":
        below = "\n" if os.isatty(2) else ""  # the progress line
        with contextlib.suppress(OSError):
            os.write(2, f"{below}{text}\n".encode())
