"""How an evaluation's command runs: on each of its processes, its result printed and written whole, its exit code.

0 done, 1 the checkpoint or the data cannot be used, or a process is missing, 2 wrong arguments, 75 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from data import sources
from data.preparation import interruption
from evaluation import record
from evaluation.asking import Log, Processes, WrongDevice, processes
from machine.rendezvous import Missing

INTERRUPTED = "interrupted: nothing was written; the same command begins again"


def run(
    arguments: argparse.Namespace,
    evaluate: Callable[[argparse.Namespace, Processes, Log], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
) -> int:
    """`evaluate` on every process, which gives each the whole result; the main one prints its `report` and writes it to
    `arguments.json`, where that names a file. Returns the exit code."""
    from checkpoints import CheckpointError
    from tokenizer import TokenizerError

    def log(line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)

    try:
        with processes() as group:
            result = evaluate(arguments, group, log)
            if group.is_main:
                print(report(result), flush=True)  # before the file, for which there may be no room
                if arguments.json is not None:
                    record.write(arguments.json, result)
    except WrongDevice as error:
        log(str(error))
        return 2
    except (CheckpointError, TokenizerError, sources.SourceError, OSError, Missing) as error:
        log(f"not evaluated: {error}")
        return 1
    except KeyboardInterrupt:
        log(INTERRUPTED)
        return interruption.INTERRUPTED
    return 0
