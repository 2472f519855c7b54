"""Train a language model: accelerate launch multigpu_train.py [--config FILE] [section.key=value ...]

The same command starts a run, resumes it after any interruption, and on any number of processes. What it does stands
in the config (default: config.yaml). Exit codes: 0 finished, 1 failed, 2 the config or the launch is wrong, 75 stopped
and saved (the same command goes on), 128 + number when a second signal ended it at once.
"""

import argparse
import contextlib
import errno
import json
import os
import sys

from machine import process
from settings import ConfigError, load
from training.requests import Requests

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
            print(json.dumps(estimate.as_json()) if arguments.json else estimate.as_text())
        return 0
    process.prepare()
    from training.start import CANNOT_START, Diverged, start

    try:
        return start(config, requests).value
    except CANNOT_START as error:
        if is_main:
            print(f"cannot start: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        if is_main:
            print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training, which saves and stops by itself
        if is_main:
            print("stopped before training: the same command goes on from there", file=sys.stderr)
        return 75
    except OSError as error:
        if error.errno == errno.ENOMEM:  # a process that prepared data was killed
            print(f"stopped: {error.strerror}", file=sys.stderr)
            return 1
        if error.errno not in FILE_TROUBLE:
            raise
        print(f"stopped: {error}. Make room, make it writable, or put back what is gone; the same command then goes on "
              "from the last checkpoint", file=sys.stderr)  # fmt: skip
        return 1
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        print(f"stopped: out of memory ({str(error).splitlines()[0] if str(error) else 'of this machine'}). Lower "
              "phases.*.micro_batch, which changes no result, or set model.gradient_checkpointing=true; --dry-run says "
              "what each phase needs", file=sys.stderr)  # fmt: skip
        return 1


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
