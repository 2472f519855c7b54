"""The traces of a job on disk: one verified folder a chunk, with the rows and, beside them, what they cost.

    traces/NAME-FINGERPRINT/job.json         all that decides the content
    traces/NAME-FINGERPRINT/chunks/00017/    traces.parquet, about.json (engine, seconds, counts), manifest.json

traces.parquet is a function of the job, the card and the build; about.json is not. The parquet's own metadata names the
job, and says so where traces may only be evaluated, so that a copied chunk is not mistaken for another's.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage import folder

if TYPE_CHECKING:
    import pyarrow

JOB, CHUNKS, TRACES, ABOUT = "job.json", "chunks", "traces.parquet", "about.json"
COLUMNS = {
    "id": "string",  # of the problem
    "sample": "int32",  # from 0: which answer to it
    "seed": "int64",
    "question": "string",
    "answer": "string",  # the right number, or null where it is not known
    "text": "string",  # what the teacher said
    "finish": "string",  # stop | length | refused
    "prompt_tokens": "int32",
    "tokens": "int32",  # of the text, the end of turn counted
}
_CHUNK = re.compile(r"\d{5,}")


class TraceError(RuntimeError):
    """Traces cannot be read: the message names the file or folder, and what would be right."""


def schema(metadata: dict[str, str] | None = None) -> "pyarrow.Schema":
    """The columns of traces.parquet."""
    import pyarrow

    fields = [pyarrow.field(name, getattr(pyarrow, kind)(), nullable=name == "answer")
              for name, kind in COLUMNS.items()]  # fmt: skip
    return pyarrow.schema(fields, metadata=metadata)


def write_chunk(
    path: Path,
    rows: Sequence[dict[str, Any]],
    spent: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one chunk's folder, all of it or nothing.

    Args:
        spent: for about.json, what it took.
        metadata: for the parquet file, of which job it is.

    Raises:
        FileExistsError: it is there.
        OSError: the disk is full.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows), schema=schema(metadata))
    with folder.write(path) as temporary:
        pyarrow.parquet.write_table(table, temporary / TRACES, compression="zstd")
        (temporary / ABOUT).write_text(json.dumps(spent or {}, indent=1), encoding="utf-8")


def read_job(path: Path) -> dict[str, Any]:
    """job.json of a job's folder: what was asked.

    Raises:
        TraceError: it is no such folder.
    """
    try:
        job = json.loads((path / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"{path / JOB} cannot be read ({error}): name a folder that distill.generate made, "
                         "traces/NAME-FINGERPRINT") from error  # fmt: skip
    if not _is_job(job):
        raise TraceError(f"{path / JOB} does not describe a job: name a folder that distill.generate made, or run the "
                         "job's command again, which writes it anew")  # fmt: skip
    return job


def _is_job(job: Any) -> bool:
    """Whether this is what a job.json holds, as far as it is read here."""
    if not isinstance(job, dict) or not isinstance(job.get("fingerprint"), str) or type(job.get("chunks")) is not int:
        return False
    content = job.get("content")
    return isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in ("prompt", "teacher"))


def chunks(path: Path) -> list[Path]:
    """The chunks that are there, verified or not, in the order of the plan."""
    root = path / CHUNKS
    there = [entry for entry in root.iterdir() if _CHUNK.fullmatch(entry.name)] if root.is_dir() else []
    return sorted(there, key=lambda entry: int(entry.name))


def missing(path: Path) -> list[int]:
    """Numbers of the plan's chunks that are not there yet. Raises TraceError as `read_job` does."""
    there = {int(chunk.name) for chunk in chunks(path)}
    return [number for number in range(read_job(path)["chunks"]) if number not in there]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of all chunks that are there, in the order of the plan, each chunk verified first.

    Raises:
        TraceError: it is no job's folder, or a chunk is damaged or another job's.
    """
    job = read_job(path)
    for chunk in chunks(path):
        yield from read_chunk(chunk, job.get("fingerprint"))


def read_chunk(chunk: Path, fingerprint: str | None = None) -> list[dict[str, Any]]:
    """The rows of one chunk, verified first; of the job with this fingerprint, if it is given.

    Raises:
        TraceError: it is damaged, or another job's.
    """
    import pyarrow
    import pyarrow.parquet

    if problems := folder.verify(chunk):
        raise TraceError(f"{problems[0]}: run the job's command again, which makes this chunk anew")
    try:
        table = pyarrow.parquet.read_table(chunk / TRACES, columns=list(COLUMNS))
    except (OSError, pyarrow.ArrowException) as error:
        remedy = "remove its folder and run the job's command again"
        raise TraceError(f"{chunk / TRACES} holds no traces ({error}): {remedy}") from error
    job = (table.schema.metadata or {}).get(b"job", b"").decode()
    if fingerprint is not None and job != fingerprint:
        raise TraceError(f"{chunk} is of job {job or '(none)'}, not {fingerprint}: move it to its own job's folder")
    return table.to_pylist()


def spent(chunk: Path) -> dict[str, Any]:
    """What a chunk took, and counts of its rows; nothing where that cannot be read."""
    try:
        found = json.loads((chunk / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
