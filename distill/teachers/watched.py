"""Runs a command for as long as whoever started this is there: `python -I watched.py COMMAND…`, with a pipe as input.

A server that is started for a job must not outlive it, or it holds the GPU of a box that somebody pays for; and a job
that is killed cannot end it any more. So this process stands between: it ends the command, with everything that the
command has started, as soon as the pipe is closed or its own parent has gone. Its exit code is the command's.

Standard library only; it is started by its path, for it needs nothing of the project.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 15.0  # seconds between asking and killing
_EVERY = 0.25  # seconds between two looks


def main(command: list[str]) -> int:
    """Run `command` in a process group of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the job, which closes the pipe in good order
    parent = os.getppid()
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, restore_signals=True,
                              preexec_fn=_default_signals)  # fmt: skip
    while server.poll() is None and os.getppid() == parent and not _closed():
        pass
    _end(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _closed() -> bool:
    """Whether nobody holds the other end of the pipe any more; takes a moment to find out."""
    readable, _, _ = select.select([sys.stdin], [], [], _EVERY)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1024)


def _end(server: subprocess.Popen) -> None:
    """Ask the whole group to end; kill what is left of it."""
    _signal(server, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE)
    until = time.monotonic() + 1.0  # its own children put themselves in order
    while time.monotonic() < until and _signal(server, 0):
        time.sleep(0.05)
    _signal(server, signal.SIGKILL)
    server.wait()


def _signal(server: subprocess.Popen, number: int) -> bool:
    """Send it to all processes of the group; False if there is none."""
    try:
        os.killpg(server.pid, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, for a group of which only the dead are left
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
