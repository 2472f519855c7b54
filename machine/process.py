"""What a process has to be told about its memory, threads and parent, most of it before torch is imported, and how it
ends.

Standard library only. Each setting was measured to matter on CPUs and leaves alone what the user's environment already
says.
"""

import atexit
import contextlib
import ctypes
import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHER_GONE = signal.SIGUSR2  # nobody else sends it: who gets it knows that it is nobody's second Ctrl-C


def prepare() -> None:
    """Call before the first import of torch; a later call changes nothing that torch has read by then."""
    # Threads that spin while they wait lose most of their speed as soon as another job wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Large tensors on huge pages: weights that are read once a token come from memory almost half as fast again.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _set_heap_limit(32 * 2**20)


def end_with_launcher() -> None:
    """Let the system send LAUNCHER_GONE to this process when its launcher dies, however that happens, once or more:
    whoever handles it stops, and where nobody does, it ends the process. Call this first of all.

    A launcher that is killed would else leave processes behind that go on training, or wait for each other for an hour.
    Linux only; a process that was started without a launcher is left alone, for then its parent may be a shell that is
    meant to end before it.

    Raises:
        SystemExit: it has died already.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if _is_launcher(parent):
        _signal_at_parents_end(LAUNCHER_GONE)
        gone = os.getppid() != parent  # before the system knew that it is to tell
    else:
        gone = parent == 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if gone:
        sys.exit("the launcher has ended, and so does this process")


def _is_launcher(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = (b"accelerate", b"torchrun", b"torch.distrib")
    return any(name in os.path.basename(word) for word in words for name in names)


def end_with_parent() -> None:
    """Let the system kill this process when the one that started it is gone. Linux only."""
    if sys.platform == "linux":
        _signal_at_parents_end(signal.SIGKILL)


def _signal_at_parents_end(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def outlive_readers() -> None:
    """Let this process work on when whoever reads its output has gone away (`| head`, a `| tee` that got Ctrl-C, a
    terminal that was closed)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this
            continue
        raw = _Outliving(stream.fileno(), "w", closefd=False)
        lines = name == "stderr" or stream.isatty()
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "replace", line_buffering=lines))


def leave(code: int) -> NoReturn:
    """End this process with `code`: what is registered for its end is done, but Python is not taken down.

    A thread of gloo's lets go of a tensor some time after the collective that it belonged to. Where Python is being
    taken down by then, the process aborts (SIGABRT), and a launcher calls a finished run failed. torch ends those
    threads with the process group, but nothing makes everybody let go of that (DDP and sharded modules do not).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, or it was closed
            stream.flush()
    os._exit(code)


class _Outliving(io.FileIO):
    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # the latter of a terminal that was closed
                raise
            return len(data)


def usable_cores() -> int:
    """CPU cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def return_memory() -> None:
    """Give every freed tensor of 2 MB or more back at once: for models beside which activations count.

    glibc keeps what is smaller than a limit on a heap, which fragments: a training step of 13 M parameters leaves it a
    third larger than what the step holds. Giving it back costs page faults, a tenth of the speed of a 1 M model, none
    that could be measured of larger ones.
    """
    _set_heap_limit(2 * 2**20)


def return_freed() -> None:
    """Give back once what has been freed so far, wherever on the heap it lies."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # else it is not glibc
        trim(0)


def keep_memory() -> None:
    """Give no freed memory back: for measurements of code that should not pay for what the system does with it."""
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set_heap_limit(size: int) -> None:
    """Tell glibc which allocations are too large for its heap; left alone, it moves this limit as it goes."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _mallopt(_M_MMAP_THRESHOLD, size)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # else it is not glibc, and there is nothing to mend
        mallopt(parameter, value)
