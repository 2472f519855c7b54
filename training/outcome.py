"""How a run ended, for whoever does not see its exit code: runs/NAME/outcome.json.

`accelerate launch` turns every exit code but 0 into 1, so that a script on a rented box could not tell a wrong config,
which only a person mends, from a crash, after which it is to go on. The main process removes the file when it starts
and writes it, whole or not at all, at every ending of its own. Where it is missing, the run goes on, or was killed.

    {"code": 75, "reason": "run.deadline", "step": 1200, "message": "run.deadline=2026-12-01T18:00:00Z is over: ..."}

    code       reason
    0          finished
    75         SIGTERM, SIGINT, SIGHUP   asked to stop, and saved
               launcher                  the launcher has ended
               request                   another process of the run was asked to
               run.stop_after_steps, run.max_minutes, run.deadline   the config says so
    2          refused                   the config, the launch, or what lies in the run's folder
    1          diverged, files, memory, missing (processes that never came), crashed (with a traceback)
    128 + n    SIGTERM, SIGINT           asked a second time, which ends it at once

`step` is the one that the run had reached, null where it had not begun; with code 0 and 75 it is saved.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import filelock

from storage import folder

NAME = "outcome.json"


def lock(run: Path) -> filelock.FileLock:
    """Who holds it trains the run in that folder; the same object for whoever asks in this process."""
    return filelock.FileLock(run / ".lock", is_singleton=True)  # the system lets go of it when its holder dies


class OutcomeFile:
    """The outcome of one run, as this process writes it."""

    def __init__(self, run: Path | None, is_main: bool = True):
        """
        Args:
            run: its folder, which is made where there is none; None: it is not known.
        """
        self.path = run / NAME if run is not None and is_main else None
        self.step: Callable[[], int | None] = lambda: None  # which the run has reached
        self._held: filelock.BaseFileLock | None = None
        self.why: Callable[[], tuple[str, str]] = lambda: ("request", "")  # reason and message of a stop

    def clear(self) -> None:
        """A run starts: what is there tells of an earlier one."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def hold(self) -> None:
        """Keep the run's lock, which this process has, until the outcome is written: whoever waits for it finds one."""
        if self.path is not None:
            self._held = lock(self.path.parent)
            self._held.acquire(timeout=0)

    def write(self, code: int, reason: str, message: str) -> None:
        """How it ended; left alone where another process trains the run, whose outcome is still to come."""
        if self.path is None:
            return
        told = {"code": code, "reason": reason, "step": self.step(), "message": message}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(filelock.Timeout), lock(self.path.parent).acquire(timeout=0):
                folder.write_file(self.path, json.dumps(told, indent=1) + "\n")
        except OSError as error:  # the ending itself matters more
            print(f"{self.path} could not be written: {error}", file=sys.stderr)
        if self._held is not None:
            self._held.release()
            self._held = None
