"""distill.generate that ends without warning for benchmarks/trace_campaign.py: FAULT=rename:2, when the second chunk of
this process is written whole and is about to get its name."""

import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.preparation import interruption
from distill import generate
from machine import process

_CHUNK = re.compile(r"\.tmp-\d{5,}-[0-9a-f]{8}")  # what storage.folder calls a chunk until then


def arm(count: int) -> None:
    """Let this process die at the `count`-th rename of a chunk."""
    rename = Path.rename
    seen = []

    def counted(path: Path, target: Path) -> Path:
        if _CHUNK.fullmatch(path.name):
            seen.append(path)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = counted


if __name__ == "__main__":
    process.end_with_launcher()
    kind, _, number = os.environ["FAULT"].partition(":")
    if kind != "rename":
        sys.exit(f"FAULT={kind}: there is only rename:N")
    arm(int(number))
    interruption.interrupt_once()
    process.leave(generate.main())
