"""`metrics.jsonl`, the one record of a run: one JSON object a line, in the order in which things happened.

`kind` tells what a record is: `train`, `validation`, `probe`, `sample` or `event`; nearly all carry `step`, `phase` and
`tokens`. Numbers that JSON cannot hold are written as null and named in `nonfinite`:
`{"loss": null, "nonfinite": {"loss": "nan"}}` is a loss that was not a number, while a plain null is one that nobody
knows. Only the main process of a run writes.

Resuming keeps the file without gap or repeat by position: `mark_checkpoint` writes a line before each save, and
`rewind` cuts the file after the line of the checkpoint that the run goes on from. A step's validation, probes and
samples that were made before the save are therefore kept, and those made after it, which the resumed run makes again,
are dropped.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage import folder


class MetricsLog:
    """Appends records to the file at `path`; the folder is created, the file is opened at the first record."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = None

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and flush it. Values may be numpy or torch scalars.

        Raises:
            TypeError: a value is nothing that JSON can hold.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_torn_tail()
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  it stays open as long as the run
        self._file.write(encode(record) + "\n")
        self._file.flush()

    def mark_checkpoint(self, step: int, phase: str, tokens: int, done: Sequence[int] = ()) -> None:
        """Record that a checkpoint of `step` is about to be written, and put all records so far safely on disk.

        Call it when everything that belongs to the checkpoint was recorded, right before saving. A mark whose save
        never finished does no harm: `rewind` is asked for a checkpoint that exists.

        Args:
            done: numbers that tell the checkpoints of one step apart: what else was done at it, such as its validation.
        """
        place = {"step": step, "phase": phase, "tokens": tokens, "done": list(done)}
        self.append({"kind": "event", "event": "checkpoint", **place})
        os.fsync(self._file.fileno())

    def rewind(self, step: int, done: Sequence[int] = ()) -> int:
        """Drop what was recorded after the checkpoint of `step` and `done` was written; returns how many lines went.

        A step that was saved twice (at the end of a phase, and again when the run was stopped before the next phase
        took a step) is cut after the first of the two: the run's state was the same, so it records the rest again.
        Without a mark for `step` (the file was edited, or comes from elsewhere) records up to `step` stay, except
        the opening of the phase that follows it. Step 0 leaves nothing: all of it is recorded again. Lines that a
        crash spoiled go; that the run was resumed before stays. A file that is missing is no error: what was watched
        never stops what is trained.
        """
        self.close()
        lines = _lines(self.path)
        kept = _kept(lines, step, list(done))
        if self.path.exists():
            folder.write_file(self.path, "".join(f"{line}\n" for line in kept))
        return len(lines) - len(kept)

    def size(self) -> int:
        """Bytes of the file so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Drop the records behind the first `size` bytes."""
        self.close()
        if self.path.exists():
            os.truncate(self.path, size)

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """All records of the file at `path`, without a last line that was torn off; none when there is no file.

        Raises:
            ValueError: a line before the last is not a JSON object; the message names file and line.
        """
        lines = _lines(Path(path))
        for number, (line, record) in enumerate(lines, start=1):
            if record is None and number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object: {line[:80]!r}; remove or mend that line")
        return [record for _, record in lines if record is not None]

    def _drop_torn_tail(self) -> None:
        """Cut an unfinished last line, so that the next record does not run into it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


def encode(record: dict[str, Any]) -> str:
    """`record` as one line of strictly valid JSON; see the top of this file for nan and infinity."""
    nonfinite: dict[str, str] = {}
    clean = _clean(record, "", nonfinite)
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, allow_nan=False, separators=(",", ":"))


def _clean(value: Any, key: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            str(name): _clean(child, f"{key}.{name}" if key else str(name), nonfinite) for name, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [_clean(child, f"{key}.{place}", nonfinite) for place, child in enumerate(value)]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[key] = str(value)
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Each whole line of the file with the record in it, None for what is not a record."""
    if not path.exists():
        return []
    *whole, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for line in whole:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        found.append((line, record if isinstance(record, dict) else None))
    return found


def _kept(lines: list[tuple[str, dict[str, Any] | None]], step: int, done: list[int]) -> list[str]:
    """The lines that stay when a run goes on from the checkpoint of `step`."""

    def places(event: str) -> list[int]:
        return [
            place
            for place, (_, record) in enumerate(lines)
            if record and record.get("event") == event and record.get("step") == step
        ]

    marks = places("checkpoint")
    marks = [mark for mark in marks if lines[mark][1].get("done", []) == done] or marks
    if step == 0:
        end = 0
    elif marks:
        phase = lines[marks[-1]][1].get("phase")
        end = next(mark for mark in marks if lines[mark][1].get("phase") == phase) + 1
    else:
        end = min(places("phase_start"), default=len(lines))
    return [
        line
        for place, (line, record) in enumerate(lines)
        if record
        and (
            record.get("event") == "resumed"
            or (place < end and (record.get("step") is None or record["step"] <= step))
        )
    ]
