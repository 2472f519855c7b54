"""The progress line of a run: rewritten in place on a terminal, one line now and then in a log file.

`format_line` is pure: what it shows depends only on its arguments. `Progress` decides when to show it and estimates
the time that is left from the steps of the last minutes, pauses for validation included.
"""

import collections
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from observe.units import UNKNOWN, bytes_, compact, decimal, duration, percent

WINDOW_SECONDS = 180.0  # long enough to hold a few validation pauses, short enough to notice a longer context
FEWEST_POINTS = 20  # slow steps are kept beyond the window, or one of them would be the whole estimate


def format_line(record: dict[str, Any], total_steps: int, eta_seconds: float | None, width: int | None = None) -> str:
    """A `train` record as one line: phase, step, loss, lr, tokens/s, MFU if known, gradient norm, memory, ETA; in
    `width` columns, without what of these is missed least."""
    rate = record.get("lr")
    parts = {
        "phase": str(record.get("phase", UNKNOWN)),
        "step": f"step {record.get('step', UNKNOWN)}/{total_steps}",
        "loss": f"loss {decimal(record.get('loss'), 4)}",
        "lr": f"lr {UNKNOWN if rate is None else format(rate, '.2e')}",
        "speed": f"{compact(record.get('tokens_per_second'))} tok/s",
        "mfu": f"mfu {percent(record.get('mfu'))}",
        "norm": f"norm {decimal(record.get('grad_norm'), 2)}",
        "mem": f"mem {bytes_(record.get('memory_bytes'))}",
        "eta": f"eta {duration(eta_seconds)}",
    }
    if record.get("mfu") is None:
        del parts["mfu"]
    missed_least = [name for name in ("norm", "lr", "mem", "mfu") if name in parts]
    while width is not None and len("  ".join(parts.values())) > width and missed_least:
        del parts[missed_least.pop(0)]
    return "  ".join(parts.values())[:width]


class Progress:
    """Shows `train` records on `stream` as they come.

    Args:
        total_steps: steps of the whole run, all phases.
        stream: where to write; a terminal gets one line that is rewritten, anything else a line at most every
            `every` seconds.
        clock: seconds from anywhere, ever growing.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self._stream = stream if stream is not None else sys.stderr
        self._in_place = self._stream.isatty()
        self._every = every
        self._clock = clock
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._shown_at = float("-inf")
        self._held_back = ""  # the latest line that was not due yet, for `close`
        self._open_line = False

    def update(self, record: dict[str, Any]) -> None:
        """Take in the record of a step, and show it if it is time to."""
        now = self._clock()
        self._recent.append((now, record["step"]))
        while len(self._recent) > FEWEST_POINTS and now - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()
        # a full last column would wrap and leave a trail of lines
        width = shutil.get_terminal_size().columns - 1 if self._in_place else None
        line = format_line(record, self.total_steps, self.eta_seconds(), width)
        if self._in_place:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
            self._open_line = True
        elif now - self._shown_at >= self._every:
            self._print(line)
            self._shown_at = now
            self._held_back = ""
        else:
            self._held_back = line

    def eta_seconds(self) -> float | None:
        """Seconds to the last step at the pace of the last minutes; None before there is a pace."""
        if len(self._recent) < 2 or self._recent[-1][1] <= self._recent[0][1]:
            return None
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        return (self.total_steps - last_step) * (last_time - first_time) / (last_step - first_step)

    def note(self, text: str) -> None:
        """Print `text` on a line of its own, above the line that is being rewritten."""
        if self._in_place and self._open_line:
            self._stream.write("\r\x1b[K")
            self._open_line = False
        elif self._held_back:  # it came before what is to be said
            self._print(self._held_back)
            self._held_back = ""
        self._print(text)

    def close(self) -> None:
        """End the line; in a log file, show the last record if it was held back."""
        if self._open_line:
            self._print("")
            self._open_line = False
        elif self._held_back:
            self._print(self._held_back)
            self._held_back = ""

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
