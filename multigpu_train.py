"""Train a language model: accelerate launch multigpu_train.py [--config FILE] [section.key=value ...]

The same command starts a run, resumes it after any interruption, and on any number of processes. What it does stands
in the config (default: config.yaml). Exit codes: 0 finished, 1 failed, 2 the config or the launch is wrong, 75 stopped
and saved (the same command goes on), 128 + number when a second signal ended it at once. A launcher makes 1 of most of
them: runs/NAME/outcome.json holds the code and the reason (training/outcome.py).
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from machine import process
from machine.rendezvous import Missing
from settings import ConfigError, load, read
from training.outcome import OutcomeFile
from training.requests import AT_ONCE, Requests

FILE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT,
                errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # fmt: skip


def main() -> int:
    """Listen to signals, and for the launcher's end, from the first moment on; then run."""
    process.end_with_launcher()
    for output in (sys.stdout, sys.stderr):  # in the order in which things happen, into a log file too
        output.reconfigure(line_buffering=True)
    with contextlib.closing(Requests()) as requests:
        return run(_parse(), requests)


def run(arguments: argparse.Namespace, requests: Requests) -> int:
    """Read the config, report all of its problems at once, then plan or train."""
    is_main = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    from training.settings import RunConfig

    try:
        config = load(RunConfig, arguments.config, arguments.overrides)
    except ConfigError as error:
        if is_main:
            print(error, file=sys.stderr)
            if not arguments.dry_run and (there := _folder_of_refused(arguments)) is not None:
                OutcomeFile(there).write(2, "refused", str(error))
        return 2
    if arguments.dry_run:
        from training.budget import plan

        try:
            estimate = plan(config)
        except ConfigError as error:
            if is_main:
                print(error, file=sys.stderr)
            return 2
        if is_main:
            told = {"run": str(config.run.path), **estimate.as_json()}
            print(json.dumps(told) if arguments.json else estimate.as_text())
        return 0
    process.prepare()
    outcome = OutcomeFile(config.run.path, is_main)
    outcome.clear()
    requests.before_end = lambda number: outcome.write(128 + number, signal.Signals(number).name, AT_ONCE)
    from training.start import start

    try:
        stopped = start(config, requests, outcome)
    except BaseException as error:
        if (ending := _ending(error, requests)) is None:  # a fault of the project's own, whose traceback is wanted
            outcome.write(1, "crashed", f"{type(error).__name__}: {error}")
            raise
        if is_main or ending.of_each:
            print(ending.message, file=sys.stderr)
        outcome.write(ending.code, ending.reason, ending.message)
        return ending.code
    if stopped.value == 0:
        outcome.write(0, "finished", "finished")
    else:
        outcome.write(stopped.value, *outcome.why())
    return stopped.value


class _Ending(NamedTuple):
    """What an exception means for whoever started the run."""

    code: int
    reason: str  # as in training/outcome.py
    message: str
    of_each: bool = False  # each process that has it says so, for it may be the only one


def _ending(error: BaseException, requests: Requests) -> _Ending | None:
    """None: it is none of those that are expected."""
    from training.start import CANNOT_START, Diverged

    if isinstance(error, CANNOT_START):
        return _Ending(2, "refused", f"cannot start: {error}")
    if isinstance(error, Missing):
        return _Ending(1, "missing", f"stopped: {error}", of_each=True)
    if isinstance(error, Diverged):
        return _Ending(1, "diverged", f"stopped: {error}")
    if isinstance(error, KeyboardInterrupt):  # before training, which saves and stops by itself
        return _Ending(75, requests.reason or "request", f"stopped before training: {requests.way_on}")
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # a process that prepared data was killed
        return _Ending(1, "memory", f"stopped: {error.strerror}", of_each=True)
    if isinstance(error, OSError) and error.errno in FILE_TROUBLE:
        message = (f"stopped: {error}. Make room, make it writable, or put back what is gone; the same command then "
                   "goes on from the last checkpoint")  # fmt: skip
        return _Ending(1, "files", message, of_each=True)
    if isinstance(error, RuntimeError | MemoryError) and _is_out_of_memory(error):
        told = str(error).splitlines()[0] if str(error) else "of this machine"
        message = (f"stopped: out of memory ({told}). Lower phases.*.micro_batch, which changes no result, or set "
                   "model.gradient_checkpointing=true; --dry-run says what each phase needs")  # fmt: skip
        return _Ending(1, "memory", message, of_each=True)
    return None


def _folder_of_refused(arguments: argparse.Namespace) -> Path | None:
    """The folder of the run that a wrong config means, where there is one and it can be told."""
    from training.settings import RUN_NAME, RunSection

    try:
        section = read(arguments.config, arguments.overrides).get("run") or {}
        name = section.get("name", RunSection().name)
        found = Path(section.get("folder", RunSection().folder)) / name
        return found if RUN_NAME.fullmatch(name) and found.is_dir() else None
    except (ConfigError, AttributeError, TypeError, ValueError, OSError):
        return None


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for GPUs, and none for the CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config.yaml", help="the run's config (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what the run will need, and exit")
    parser.add_argument("--json", action="store_true", help="with --dry-run: one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. optimizer.muon_lr=0.01")
    arguments = parser.parse_intermixed_args()
    if arguments.json and not arguments.dry_run:
        parser.error("--json goes with --dry-run")
    return arguments


if __name__ == "__main__":
    process.outlive_readers()
    process.leave(main())
