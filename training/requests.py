"""What the outside world asks of a running process: stop, save, or end at once.

    SIGTERM, SIGINT    once: save and stop (exit code 75); again, a moment later: end at once (128 + number)
    run.max_minutes    like SIGTERM, when so much time has passed since this process began
    SIGUSR1            save and go on

A signal only raises a flag. Who acts on it asks all ranks first (`Strategy.sum`), so that they stop and save at the
same step. Where nothing is lost by being cut off, as while the data is prepared, `interruptible` makes the first
signal a KeyboardInterrupt.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

# A launcher passes on the Ctrl-C that its processes have seen as well: what comes so soon is the same request.
SAME_REQUEST = 1.0  # seconds


class Stopped(Exception):
    """Asked to stop, and all ranks agree."""


class Requests:
    """The requests made of this process so far; makes itself the handler of the signals above."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self.reason = ""  # why it is to stop
        self._max_minutes: float | None = None
        self._since = 0.0
        self._interruptible = False
        self._parent = os.getppid()
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGALRM: self._stop,
                    signal.SIGUSR1: self._save}  # fmt: skip
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    @contextlib.contextmanager
    def limited(self, max_minutes: float | None) -> Iterator[None]:
        """Inside, a request to stop comes after so many minutes; None: it does not."""
        self._max_minutes = max_minutes
        if max_minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 60 * max_minutes)
        try:
            yield
        finally:
            if max_minutes is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

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
        if number == signal.SIGTERM and os.getppid() != self._parent:
            # The launcher has ended, maybe seconds after the Ctrl-C that ended it and that this process has seen too
            # (models.host.end_with_launcher): one request, not two.
            self._parent = os.getppid()
            if self.stop:
                return
        if self.stop:
            if number != signal.SIGALRM and now - self._since > SAME_REQUEST:
                _say("asked a second time: ending at once; what was saved stands")
                os._exit(128 + number)
            return
        self.stop, self._since = True, now
        over = f"run.max_minutes={self._max_minutes} are over"
        self.reason = over if number == signal.SIGALRM else signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt
        _say(f"{self.reason}: stopping at the next step, and saving")

    def _save(self, _number: int, _frame: Any) -> None:
        self.save = True


def _say(text: str) -> None:
    """From one of the processes, in a signal's handler: past Python's buffers, which may be in use just now."""
    if os.environ.get("RANK", "0") == "0":
        below = "\n" if os.isatty(2) else ""  # the progress line
        with contextlib.suppress(OSError):
            os.write(2, f"{below}{text}\n".encode())
