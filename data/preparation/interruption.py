"""What the command does when it is asked to stop, by SIGTERM or Ctrl-C: what it has done so far stays, at any instant.

    end_at_once()     before there is anything to put in order: a line, and exit code 75
    interrupt_once()  from then on: a KeyboardInterrupt, and at the second request it ends at once, with 128 + the
                      signal's number, and its workers with it (machine.process.end_with_parent)

Standard library only: it is there before anything else is imported.
"""

import contextlib
import os
import signal
from typing import Any

INTERRUPTED = 75  # exit code
MESSAGE = "interrupted: the same command goes on from there"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once(message: str = MESSAGE) -> None:
    """Handle the signals so from now on."""
    _handle(lambda *_: _leave(message, INTERRUPTED))


def interrupt_once() -> None:
    """Handle the signals so from now on."""
    _handle(_interrupt)


def _handle(handler: Any) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    _handle(lambda number, _: _leave("asked a second time: ending at once; what is done so far stays", 128 + number))
    raise KeyboardInterrupt


def _leave(message: str, code: int) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())
    os._exit(code)
