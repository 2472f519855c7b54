"""multigpu_train.py that ends without warning at a chosen moment, for benchmarks/fault_campaign.py: FAULT=rename:1.

    kill_preparing:n    at the n-th time that something is made durable
    kill_validating:n   at the n-th batch of validation
    kill_saving:n       when the first file of the n-th checkpoint is written
    rename:n            when all files of the n-th checkpoint are written, and it is about to get its name
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multigpu_train
from machine import process
from storage import folder


class _Countdown:
    """Kills this process when it has been called so many times with something that was not there before."""

    def __init__(self, left: int):
        self.left = left
        self.seen: set[Any] = set()

    def __call__(self, what: Any) -> None:
        if what not in self.seen:
            self.seen.add(what)
            if len(self.seen) == self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def _before(function: Callable, notice: Callable[[Path], None]) -> Callable:
    def called(path: Path, *rest: Any) -> Any:
        notice(path)
        return function(path, *rest)

    return called


def arm(fault: str, count: _Countdown) -> None:
    """Put the end of this process where `fault` says."""
    if fault == "kill_preparing":
        folder._fsync = _before(folder._fsync, lambda _: count(len(count.seen)))
    elif fault == "kill_saving":
        folder._describe = _before(
            folder._describe, lambda path: path.parent.name.startswith(".tmp-step-") and count(path.parent)
        )
    elif fault == "rename":
        Path.rename = _before(Path.rename, lambda path: path.name.startswith(".tmp-step-") and count(path))
    else:
        from training.trainer import Trainer

        batches = Trainer._unless_stopped

        def counted(trainer: Trainer, things: Any) -> Iterator[Any]:
            for thing in batches(trainer, things):
                count(len(count.seen))
                yield thing

        Trainer._unless_stopped = counted


if __name__ == "__main__":
    chosen, _, number = os.environ["FAULT"].partition(":")
    arm(chosen, _Countdown(int(number)))
    process.leave(multigpu_train.main())
