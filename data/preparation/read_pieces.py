"""The first stage of preparation: one piece of a source, or several small ones, -> one table, with every row and what
became of it.

What one row alone decides is decided here, by any number of processes at once: whether it is a document, its normal
form, the filters, decontamination, and the hashes by which duplicates are found. The table is the one file of a
verified folder, so an interrupted preparation keeps the pieces that are done, and trusts none that has changed since.

    part    int64   of a malformed row: which of the pieces that are read together it is in, from 0
    line    int64   and where in it, counted within the piece
    fault   string  why the row is dropped, one word to count by; null: it may stay
    malformed bool  whether the row is no document at all
    count   int64   rows this one stands for
    detail  string  what is wrong with a malformed row, for people
    text    string  the normalised document, null if it is dropped
    key     binary  16 bytes that tell the text from any other
    bands   list<uint64>, shingles list<uint64>   of near_duplicates; empty where that is not asked for
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data import conversations, sources
from data.preparation import clean, filters, near_duplicates
from data.preparation.contamination import Questions
from data.preparation.filters import FilterSection
from storage import folder

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS, BATCH_CHARACTERS = 1024, 500_000  # that are in memory at a time
TABLE = "rows.arrow"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is asked of each row."""

    field: str | None  # None: conversations
    min_characters: int
    filters: FilterSection
    near_duplicates: bool  # whether their hashes are wanted
    questions: Path | None  # contamination.Questions, saved


def schema() -> "pyarrow.Schema":
    """Of the table described above."""
    import pyarrow

    numbers = pyarrow.list_(pyarrow.uint64())
    return pyarrow.schema(
        [("part", pyarrow.int64()), ("line", pyarrow.int64()), ("fault", pyarrow.string()),
         ("malformed", pyarrow.bool_()), ("count", pyarrow.int64()), ("detail", pyarrow.string()),
         ("text", pyarrow.large_string()), ("key", pyarrow.binary()), ("bands", numbers), ("shingles", numbers)]
    )  # fmt: skip


def read_piece(pieces: Sequence[sources.Piece], rules: Rules, path: Path) -> None:
    """Write the table of `pieces`, one behind the other, to the folder `path`.

    Raises:
        sources.SourceError: a piece cannot be read.
    """
    import pyarrow.ipc

    with folder.write(path, tidy=False) as temporary:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_file(str(temporary / TABLE), schema(), options=options) as writer:
            for rows in batches(_judged(pieces, rules), lambda row: row.get("text") or ""):
                writer.write_batch(_with_hashes(rows, rules))


def read_table(path: Path, columns: list[str]) -> Iterator["pyarrow.RecordBatch"]:
    """The batches of the table in the folder `path`, only some columns of them."""
    import pyarrow
    import pyarrow.ipc

    wanted = [schema().get_field_index(name) for name in columns]
    with pyarrow.OSFile(str(path / TABLE)) as file:
        reader = pyarrow.ipc.open_file(file, options=pyarrow.ipc.IpcReadOptions(included_fields=wanted))
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _judged(pieces: Sequence[sources.Piece], rules: Rules) -> Iterator[dict[str, Any]]:
    questions = _questions(rules.questions) if rules.questions else None
    rows = ((part, row) for part, piece in enumerate(pieces) for row in sources.read_piece(piece, rules.field))
    for part, row in rows:
        if isinstance(row, sources.BadRow):
            yield {"part": part, "line": row.line, "fault": row.reason, "malformed": True, "count": row.count,
                   "detail": row.detail}  # fmt: skip
            continue
        text = row if rules.field is None else clean.normalise(row)
        said = conversations.contents_of(text)
        fault = "too_short" if len(said) < rules.min_characters else filters.fault(said, rules.filters)
        if fault is None and questions is not None and (name := questions.held_by(said)):
            fault = f"in_evaluation_{name}"
        found = {"fault": fault, "malformed": False, "count": 1}
        yield found if fault else {**found, "text": text, "key": clean.key_of(text)}


@functools.cache
def _questions(path: Path) -> Questions:
    return Questions.load(path)


def batches(items: Iterator[T], text_of: Callable[[T], str]) -> Iterator[list[T]]:
    """`items` a batch at a time, so that neither their number nor their text grows beyond what fits the memory."""
    batch: list[T] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(text_of(item))
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_hashes(rows: list[dict[str, Any]], rules: Rules) -> "pyarrow.RecordBatch":
    import pyarrow

    kept = [row for row in rows if row.get("text") is not None] if rules.near_duplicates else []
    sets = near_duplicates.shingles([conversations.contents_of(row["text"]) for row in kept]) if kept else []
    for row, bands, shingles in zip(kept, near_duplicates.bands(sets), sets, strict=True):
        row["bands"], row["shingles"] = bands, shingles
    return pyarrow.RecordBatch.from_pylist(rows, schema=schema())
