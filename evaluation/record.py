"""Which questions a checkpoint was asked before: runs/x/evaluations.jsonl, a line for each evaluation that ended well.

And the file in which --json writes a result.

A test set tells the truth once. Who looks at it again and again, and keeps the checkpoint that did best, has made a
validation set of it; so whoever asks a second time is told that it is one.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from checkpoints import checkpoint, huggingface
from settings import in_the_way, kind_of
from storage import folder

NAME = "evaluations.jsonl"


def identity(path: Path) -> str:
    """16 hex digits of the weights in a folder that `checkpoints.locate` gave, wherever it lies."""
    if not huggingface.is_folder(path):
        return folder.sums(path)[checkpoint.MODEL][:16]
    files = sorted((file.name, file.stat().st_size) for file in huggingface.weight_files(path))
    config = (path / huggingface.CONFIG).read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([files, config]).encode()).hexdigest()[:16]


def file_of(path: Path) -> Path:
    """The record that belongs to a folder that `checkpoints.locate` gave: in the run's folder, or beside a checkpoint
    or a stock folder that lies alone, as nothing is ever added to what was written and verified."""
    if path.parent.name == "checkpoints":
        return path.parent.parent / NAME
    return path.with_name(f"{path.name}.{NAME}")


def earlier(path: Path, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of these very weights that agree with `what`, the oldest first."""
    wanted = {**what, "weights": identity(path)}
    file, found = file_of(path), []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # of a write that was cut short
            continue
        if isinstance(entry, dict) and all(entry.get(key) == value for key, value in wanted.items()):
            found.append(entry)
    return found


def fault(file: Path | None) -> str | None:
    """Why a result could not be written to `file`, which better is known before the evaluation; None if it can."""
    if file is None:
        return None
    if file.is_dir():
        return "that is a folder: name a file in it"
    if (blocking := in_the_way(file.parent)) is not None:
        return f"{blocking} is {kind_of(blocking)}: name a file in a folder, which is made when needed"
    return None


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result, all of it or nothing. Raises OSError, with the file's name, where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder.write_file(file, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        told = f"{error.strerror or error}, so the result is above and not in the file: make room or make it writable"
        raise OSError(error.errno, told, str(file)) from error


def add(path: Path, entry: dict[str, Any]) -> None:
    """Record an evaluation of the checkpoint at `path`. Raises OSError where its folder cannot be written."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    line = json.dumps({"date": when, "checkpoint": path.name, "weights": identity(path), **entry})
    with open(file_of(path), "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
