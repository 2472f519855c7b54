"""multigpu_train.py that dies while it saves, for benchmarks/fault_campaign.py: FAULT=kill_saving:2 or rename:1.

`kill_saving:n` ends the process without warning when the first file of the n-th checkpoint is written, `rename:n` when
all of its files are and it is about to get its name.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multigpu_train
from storage import folder


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(original: Callable, is_it: Callable[[Path], bool], left: int) -> Callable:
    seen = set()

    def called(path: Path, *rest: Any) -> Any:
        if is_it(path) and str(path.parent if path.parent.name.startswith(".tmp-") else path) not in seen:
            seen.add(str(path.parent if path.parent.name.startswith(".tmp-") else path))
            if len(seen) == left:
                _die()
        return original(path, *rest)

    return called


if __name__ == "__main__":
    fault, _, number = os.environ["FAULT"].partition(":")
    if fault == "rename":
        Path.rename = _dying(Path.rename, lambda path: path.name.startswith(".tmp-step-"), int(number))
    else:
        folder._describe = _dying(folder._describe, lambda path: path.parent.name.startswith(".tmp-step-"), int(number))
    sys.exit(multigpu_train.main())
