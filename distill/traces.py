"""The traces of a job on disk: one verified folder a chunk, with the rows and, beside them, what they cost.

    traces/NAME-FINGERPRINT/job.json         all that decides the content
    traces/NAME-FINGERPRINT/chunks/00017/    traces.parquet, about.json (engine, seconds, counts), manifest.json

traces.parquet is a function of the job, the card and the build; about.json is not. The parquet's own metadata names the
job, and says so where traces may only be evaluated, so that a copied chunk is not mistaken for another's.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage import folder

if TYPE_CHECKING:
    import pyarrow

JOB, CHUNKS, TRACES, ABOUT = "job.json", "chunks", "traces.parquet", "about.json"
_CHUNK = re.compile(r"\d{5,}")


class TracesError(RuntimeError):
    """A folder of traces that cannot be used; the message names it, and what would be right."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """One answer of a teacher."""

    id: str  # of the problem
    sample: int  # from 0: which answer to it
    seed: int
    question: str
    answer: str | None  # the right number, where it is known
    text: str
    finish: str  # stop | length | refused
    prompt_tokens: int
    tokens: int  # of the answer, the end of turn counted


def schema(metadata: dict[str, str] | None = None) -> "pyarrow.Schema":
    """The columns of traces.parquet."""
    import pyarrow

    text, small, large = pyarrow.string(), pyarrow.int32(), pyarrow.int64()
    kinds = {"id": text, "sample": small, "seed": large, "question": text, "answer": text, "text": text,
             "finish": text, "prompt_tokens": small, "tokens": small}  # fmt: skip
    fields = [pyarrow.field(name, kind, nullable=name == "answer") for name, kind in kinds.items()]
    return pyarrow.schema(fields, metadata=metadata)


def write(path: Path, rows: Sequence[Trace], about: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write one chunk's folder, all of it or nothing.

    Raises:
        FileExistsError: it is there.
        OSError: the disk is full.
    """
    import pyarrow
    import pyarrow.parquet

    columns = schema(metadata)
    table = pyarrow.Table.from_pylist([vars(row) for row in rows], schema=columns)
    with folder.write(path) as temporary:
        pyarrow.parquet.write_table(table, temporary / TRACES, compression="zstd")
        (temporary / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def describe(path: Path) -> dict[str, Any]:
    """job.json of a job's folder.

    Raises:
        TracesError: it is no such folder.
    """
    try:
        about = json.loads((path / JOB).read_text(encoding="utf-8"))
        if not isinstance(about["chunks"], int) or not isinstance(about["fingerprint"], str):
            raise ValueError("it tells neither chunks nor fingerprint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TracesError(f"{path} is no folder of traces ({JOB}: {error!r}): name one that distill.generate made, "
                          "traces/NAME-FINGERPRINT") from error  # fmt: skip
    return about


def chunks(path: Path) -> list[Path]:
    """The chunks that are there, verified or not, in the order of the plan."""
    root = path / CHUNKS
    there = [entry for entry in root.iterdir() if _CHUNK.fullmatch(entry.name)] if root.is_dir() else []
    return sorted(there, key=lambda entry: int(entry.name))


def missing(path: Path) -> list[int]:
    """Numbers of the plan's chunks that are not there yet."""
    there = {int(chunk.name) for chunk in chunks(path)}
    return [number for number in range(describe(path)["chunks"]) if number not in there]


def read(folders: Sequence[Path]) -> Iterator[Trace]:
    """The traces of all chunks that are there, in the order of the plans, each chunk verified first.

    Raises:
        TracesError: a folder is none, or a chunk is damaged or another job's.
    """
    for path in folders:
        fingerprint = describe(path)["fingerprint"]
        for chunk in chunks(path):
            yield from read_chunk(chunk, fingerprint)


def read_chunk(chunk: Path, fingerprint: str) -> list[Trace]:
    """The traces of one chunk of the job with this fingerprint, verified first. Raises TracesError as `read` does."""
    import pyarrow
    import pyarrow.parquet

    if problems := folder.verify(chunk):
        raise TracesError(f"{problems[0]}: run the job again, which makes this chunk anew")
    try:
        table = pyarrow.parquet.read_table(chunk / TRACES)
        rows = [Trace(**row) for row in table.to_pylist()]
    except (OSError, TypeError, pyarrow.ArrowException) as error:
        remedy = "remove its folder and run the job again"
        raise TracesError(f"{chunk / TRACES} holds no traces ({error}): {remedy}") from error
    if (job := (table.schema.metadata or {}).get(b"job", b"").decode()) != fingerprint:
        raise TracesError(f"{chunk} is of job {job or '(none)'}, not {fingerprint}: move it to its own job's folder")
    return rows


def about(chunk: Path) -> dict[str, Any] | None:
    """about.json of a chunk, None where it cannot be read."""
    try:
        found = json.loads((chunk / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
