"""Documents from anywhere, as one stream: JSON lines, parquet, plain text, the Hub, or the embedded generator.

A source is written "KIND:REST", for example `jsonl:corpus/*.jsonl`; a file of JSON lines may also be one JSON array.
What comes of a row is the text in the column `field` or, where `field` is None, a conversation (data/conversations.py).
A row that is neither (bad JSON, no such field, not text, not UTF-8) comes out of the stream as a `BadRow` in its place,
so that the caller counts it and goes on; a file that cannot be read at all raises `SourceError`. Files are read sorted
by name, in bounded memory (one document, or one batch of a parquet row group, at a time). `pieces` cuts a source into
parts of about one size that can be read in any order by any number of processes, and together give every row once.
"""

import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from data import conversations, embedded

Split = Literal["train", "valid", "test"]

KINDS = ("embedded", "jsonl", "parquet", "text", "hub")
SEPARATOR = "<|endoftext|>"  # a line of a text file that is exactly this ends a document
PARQUET_BATCH = 1024  # rows decoded at a time
PIECE_BYTES, PIECE_DOCUMENTS = 8_000_000, 2500  # of a file, and of a generator
ROW = "row as JSON"  # the column of a conversation that was downloaded
NO_TEXT = "type of what is no text"  # a second column, with a name where the value of a downloaded row was no text
COMPRESSED = {".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4"}
LONGEST_ROW = 256_000_000  # bytes of a line, or of a text document: more is no document, but a mistake
# The split of a Hub data set for each side: the first of these that it has. "test" is read for evaluation alone.
HUB_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "val", "dev"), "test": ("test",)}
OFFLINE = "Go online for this one preparation, or name a local folder or file"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)?")


class SourceError(Exception):
    """A source as a whole cannot be read: it is named, with what would be right."""


class BadContentError(SourceError):
    """It was read, and what is in it is of no use: reading it again would end the same way."""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that is no document: `reason` is one word to count by, `where` is "file:line", the rest is for people."""

    reason: str
    file: str
    line: int  # from 1, counted from the beginning of the piece that was read; of an array's file, its entry
    detail: str
    count: int = 1

    @property
    def where(self) -> str:
        """file:line"""
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a source: bytes [start, stop) of a file, row groups of a parquet file, or documents of a generator.

    A row belongs to the piece in which it begins. `stop` None: to the end.
    """

    kind: str
    place: str  # a file, an embedded corpus, or a data set of the Hub
    start: int = 0
    stop: int | None = None
    split: Split = "train"
    seed: int = 0  # of the embedded generator
    origin: str | None = None  # what was downloaded to `place`, among other pieces: its rows are counted over all


def parse(source: str) -> tuple[str, str]:
    """ "jsonl:a/*.jsonl" -> ("jsonl", "a/*.jsonl").

    Raises:
        ValueError: there is no such kind, or nothing after it; the message is the remedy.
    """
    kind, colon, rest = source.partition(":")
    if kind not in KINDS or not colon:
        raise ValueError("write a source as KIND:REST, where KIND is " + ", ".join(KINDS[:-1]) + " or " + KINDS[-1])
    if not rest.strip():
        raise ValueError(f"name what to read after {kind}:")
    return kind, rest


def files(source: str) -> list[Path]:
    """The local files that a source reads, in reading order; none for the generator and for data sets on the Hub."""
    kind, rest = parse(source)
    if kind == "embedded":
        return []
    path = Path(rest).expanduser()
    if kind == "hub":
        return sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else []
    if path.is_file():
        return [path]
    found = (Path(name) for name in glob.glob(str(path), recursive=True))
    return sorted(entry for entry in found if entry.is_file())


def fault(source: str) -> str | None:
    """What to change in `source` before it can be read, as far as this machine's files tell; None if nothing."""
    try:
        kind, rest = parse(source)
    except ValueError as error:
        return str(error)
    if kind == "embedded":
        return None if rest in embedded.CORPORA else "the embedded corpora are " + ", ".join(embedded.CORPORA)
    if kind == "hub":
        if Path(rest).expanduser().is_dir() or _HUB_NAME.fullmatch(rest):
            return None
        return "write hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, or hub: and an existing folder with a data set"
    if Path(rest).expanduser().is_dir():
        return f"this is a folder: name its files, for example {kind}:{rest.rstrip('/')}/*"
    for path in files(source):
        if not os.access(path, os.R_OK):
            return f"make {path} readable"
        if path.suffix in COMPRESSED:
            return f"unpack {path}: compressed files are not read (a parquet file may be compressed inside)"
    return None if files(source) else "no such file here: name an existing file, or a pattern that matches some"


def documents(
    source: str, field: str | None = "text", split: Split = "train", count: int | None = None, seed: int = 0
) -> Iterator[str | BadRow]:
    """The documents of a source in a fixed order, bad rows in their places.

    Args:
        source: "KIND:REST".
        field: column of JSON lines, parquet and Hub rows that holds the text; None: the rows are conversations, and
            what comes out is the one text that data.conversations makes of each.
        split: side of an embedded or Hub source; files have no sides and are read whole for either.
        count: stop after this many documents (bad rows not counted); of embedded sources, only facts end without it.
        seed: of the embedded generator.

    Raises:
        SourceError: a file or data set cannot be read.
        ValueError: `source` is not of the form KIND:REST.
    """
    whole = _wholes(source, split, count, seed)
    stream = itertools.chain.from_iterable(read_piece(piece, field) for piece in whole)
    return stream if count is None else _first(stream, count)


def pieces(source: str, split: Split, count: int | None, seed: int) -> list[Piece]:
    """The parts of a source, in the order of `documents`. At least `count` documents are in them, if there are.

    Raises:
        SourceError: a file cannot be read.
    """
    found = []
    for whole in _wholes(source, split, count, seed):
        if whole.kind == "parquet":
            groups = _parquet_groups(Path(whole.place))
            found += [dataclasses.replace(whole, start=first, stop=stop) for first, stop in groups]
            continue
        if whole.kind == "hub":
            found.append(whole)
            continue
        if whole.kind == "jsonl" and _is_array(Path(whole.place)):
            found.append(whole)
            continue
        size = whole.stop if whole.kind == "embedded" else Path(whole.place).stat().st_size
        step = PIECE_DOCUMENTS if whole.kind == "embedded" else PIECE_BYTES
        starts = range(0, max(size, 1), step)
        found += [dataclasses.replace(whole, start=start, stop=min(start + step, size)) for start in starts]
    return found


def read_piece(piece: Piece, field: str | None = "text") -> Iterator[str | BadRow]:
    """The documents of one piece, bad rows in their places. Raises SourceError where it cannot be read."""
    path = Path(piece.place)
    try:
        if piece.kind == "embedded":
            made = embedded.talks if field is None else embedded.documents
            yield from made(piece.place, piece.split, piece.stop, piece.seed, first=piece.start)
        elif piece.kind == "hub":
            yield from _hub_documents(piece.place, field, piece.split)
        elif piece.kind == "jsonl" and _is_array(path):
            yield from _array_documents(path, field)
        elif piece.kind == "jsonl":
            yield from _jsonl_documents(path, field, piece.start, piece.stop)
        elif piece.kind == "parquet":
            yield from _parquet_documents(path, field, piece.start, piece.stop)
        else:
            yield from _text_documents(path, piece.start, piece.stop)
    except OSError as error:  # pyarrow raises OSError too, for pages that do not decompress
        raise SourceError(f"{piece.kind}:{path} cannot be read: {error}") from error


@functools.cache
def lines_of(piece: Piece) -> int:
    """How many lines of its file, or rows of its table, lie before the next piece."""
    if piece.kind == "parquet":
        return _parquet_rows(Path(piece.place), piece.start, piece.stop)
    if piece.kind not in ("jsonl", "text") or (piece.kind == "jsonl" and _is_array(Path(piece.place))):
        return 0
    lines = 0
    with open(piece.place, "rb") as file:
        _to_line_start(file, piece.start)
        here = file.tell()
        end = Path(piece.place).stat().st_size
        if piece.stop is not None and piece.stop < end:
            end = _to_line_start(file, piece.stop)
        file.seek(here)
        while here < end and (chunk := file.read(min(2**20, end - here))):
            lines += chunk.count(b"\n")
            here += len(chunk)
    return lines


def _wholes(source: str, split: Split, count: int | None, seed: int) -> list[Piece]:
    """One piece for each file, generator or data set of a source."""
    kind, rest = parse(source)
    if kind == "embedded":
        there = embedded.size(rest, split)
        return [Piece(kind, rest, 0, count if there is None else min(count or there, there), split, seed)]
    if kind == "hub":
        return [Piece(kind, rest, split=split)]
    paths = files(source)
    if not paths:
        raise SourceError(f"{source}: no such file; name an existing file, or a pattern that matches some")
    return [Piece(kind, str(path), split=split) for path in paths]


def _first(stream: Iterator[str | BadRow], count: int) -> Iterator[str | BadRow]:
    while count > 0:
        item = next(stream, None)
        if item is None:
            return
        yield item
        count -= isinstance(item, str)


def _to_line_start(file: IO[bytes], offset: int) -> int:
    """Move to the first line that begins at `offset` or behind it; returns where that is."""
    if offset == 0:
        file.seek(0)
        return 0
    file.seek(offset - 1)
    while (part := file.readline(2**20)) and not part.endswith(b"\n"):
        pass
    return file.tell()


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a file from where it stands; None in place of one that is longer than any row may be."""
    while line := file.readline(LONGEST_ROW):
        if len(line) < LONGEST_ROW or line.endswith(b"\n"):
            yield line
            continue
        while (part := file.readline(2**20)) and not part.endswith(b"\n"):
            pass
        yield None


@functools.lru_cache(10_000)
def _is_array(path: Path) -> bool:
    """Whether a file is one JSON array, and not lines of which the first happens to be one."""
    with open(path, "rb") as file:
        begins = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not begins.startswith(b"["):
            return False
        file.seek(0)
        first = file.readline(LONGEST_ROW)
        only = not file.read(4096).strip()
    if len(begins) > 1 and only:
        return True
    try:
        json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return True
    return False


def _array_documents(path: Path, field: str | None) -> Iterator[str | BadRow]:
    if path.stat().st_size > LONGEST_ROW:
        raise SourceError(f"jsonl:{path} is one JSON array of more than {LONGEST_ROW:,} bytes, which is read at once: "
                          "write one object a line")  # fmt: skip
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadContentError(f"jsonl:{path} begins as one JSON array, and is none: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _field_of(row, field, str(path), number)


def _jsonl_documents(path: Path, field: str | None, start: int, stop: int | None) -> Iterator[str | BadRow]:
    name = str(path)
    with open(path, "rb") as file:
        here = _to_line_start(file, start)
        for number, line in enumerate(_lines(file), start=1):
            if stop is not None and here >= stop:
                return
            begins_file, here = here == 0, file.tell()
            if line is None:
                yield BadRow("too_long", name, number, f"longer than {LONGEST_ROW:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if begins_file else "utf-8")
            except UnicodeDecodeError as error:
                yield BadRow("bad_utf8", name, number, str(error))
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield BadRow("bad_json", name, number, f"{error}; it begins {text[:60]!r}")
                continue
            yield _field_of(row, field, name, number)


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"parquet:{path} is not a whole parquet file: {error}") from error


def _parquet_groups(path: Path) -> list[tuple[int, int]]:
    """[first, stop) of row groups that together have about one piece's bytes."""
    with _open_parquet(path) as file:
        sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
    cuts, size = [0], 0
    for index, more in enumerate(sizes):
        if size and size + more > PIECE_BYTES:
            cuts.append(index)
            size = 0
        size += more
    return list(itertools.pairwise([*cuts, len(sizes)]))


def _parquet_rows(path: Path, start: int, stop: int | None) -> int:
    with _open_parquet(path) as file:
        groups = range(file.metadata.num_row_groups)[start:stop]
        return sum(file.metadata.row_group(index).num_rows for index in groups)


def _parquet_documents(path: Path, field: str | None, start: int, stop: int | None) -> Iterator[str | BadRow]:
    import pyarrow

    if field is None:
        yield from _parquet_conversations(path, start, stop)
        return
    name = str(path)
    with _open_parquet(path) as file:
        groups = list(range(file.metadata.num_row_groups)[start:stop])
        if field not in file.schema_arrow.names:
            if rows := sum(file.metadata.row_group(index).num_rows for index in groups):
                detail = f"its columns are {', '.join(file.schema_arrow.names)}"
                yield BadRow("missing_field", name, 1, f"no column {field!r}; {detail}", count=rows)
            return
        if file.schema_arrow.names.count(field) > 1:
            raise SourceError(f"parquet:{path} has several columns {field!r}: rename all but one")
        kind = file.schema_arrow.field(field).type
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=groups, columns=[field, NO_TEXT]):
                values = _parquet_values(batch.column(field), kind)
                others = batch.column(NO_TEXT).to_pylist() if NO_TEXT in batch.schema.names else itertools.repeat(None)
                for value, other in zip(values, others, strict=False):
                    number += 1
                    if other is not None:
                        yield BadRow("not_text", name, number, f"{field!r} is a {other}, not text")
                    else:
                        yield _field_of({field: value}, field, name, number)
        except pyarrow.ArrowException as error:
            raise SourceError(f"parquet:{path} is damaged after row {number}: {error}") from error


def _parquet_conversations(path: Path, start: int, stop: int | None) -> Iterator[str | BadRow]:
    import pyarrow

    with _open_parquet(path) as file:
        groups = list(range(file.metadata.num_row_groups)[start:stop])
        columns = [name for name in (ROW, *conversations.COLUMNS) if name in file.schema_arrow.names]
        if not columns:
            if rows := sum(file.metadata.row_group(index).num_rows for index in groups):
                detail = f"no conversations; its columns are {', '.join(file.schema_arrow.names)}"
                yield BadRow("missing_field", str(path), 1, detail, count=rows)
            return
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _field_of(json.loads(row[ROW]) if ROW in row else row, None, str(path), number)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise SourceError(f"parquet:{path} is damaged after row {number}: {error}") from error


def _parquet_values(column: Any, kind: Any) -> list[Any]:
    """Values of one batch; text as undecoded bytes, so that one row that is not UTF-8 does not cost the others."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _text_documents(path: Path, start: int, stop: int | None) -> Iterator[str | BadRow]:
    separator = SEPARATOR.encode()
    with open(path, "rb") as file:
        here = _to_line_start(file, start)
        if stop is not None and here >= stop:
            return
        inside = here == 0 or _ends_in_separator(file, here)  # of a document of this piece, else of the one before
        lines: list[bytes] = []
        size, first, begins = 0, 1, here
        for number, line in enumerate(itertools.chain(_lines(file), [separator]), start=1):
            if line is None or line.rstrip(b"\r\n") != separator:
                if not inside and stop is not None and here >= stop:
                    return
                if inside:
                    size += LONGEST_ROW if line is None else len(line)
                    if size < LONGEST_ROW:
                        lines.append(line)
                    else:
                        lines.clear()
                here = file.tell()
                continue
            if inside and size >= LONGEST_ROW:
                yield BadRow("too_long", str(path), first, f"longer than {LONGEST_ROW:,} bytes")
            elif inside and (data := b"".join(lines)).strip():
                yield _decoded(data.removeprefix(b"\xef\xbb\xbf") if begins == 0 else data, path, first)
            here = file.tell()
            if stop is not None and here >= stop:
                return
            lines, size, first, begins, inside = [], 0, number + 1, here, True


def _ends_in_separator(file: IO[bytes], offset: int) -> bool:
    """Whether the line before `offset` is a separator; the file stays where it is."""
    file.seek(max(0, offset - len(SEPARATOR) - 3))
    before = file.read(offset - file.tell()).removesuffix(b"\n").rstrip(b"\r")  # a blank line is no end of it
    file.seek(offset)
    return before.split(b"\n")[-1] == SEPARATOR.encode()


def _decoded(data: bytes, path: Path, first: int) -> str | BadRow:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return BadRow("bad_utf8", str(path), first + data[: error.start].count(b"\n"), str(error))


def _hub_documents(rest: str, field: str | None, split: Split) -> Iterator[str | BadRow]:
    try:
        for number, row in enumerate(open_hub(rest, field, split), start=1):
            yield _field_of(row, field, f"hub:{rest}", number)
    except ConnectionError as error:
        raise SourceError(f"hub:{rest} cannot be reached: {error}. {OFFLINE}") from error


def open_hub(rest: str, field: str | None, split: Split) -> Any:
    """One side of a data set of the Hub, or of a folder, as a stream of rows (datasets.IterableDataset).

    Raises:
        SourceError: there is no such data set, side or field.
        ConnectionError: the Hub cannot be reached.
        OSError: it is busy (`is_busy`).
    """
    import datasets

    folder = Path(rest).expanduser()
    owner_and_name, config = (str(folder), None) if folder.is_dir() else _hub_name(rest)
    try:
        found = datasets.load_dataset(owner_and_name, config, streaming=True)
        name = next((name for name in HUB_SPLITS[split] if name in found), None)
        if name is None:
            raise SourceError(f"hub:{rest} has no split {' or '.join(HUB_SPLITS[split])}; it has {', '.join(found)}")
        first = next(iter(found[name]), None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ConnectionError) or is_busy(error):
            raise
        raise SourceError(f"hub:{rest} cannot be read: {error}") from error
    if first is not None and field is None and not set(first) & set(conversations.COLUMNS):
        raise SourceError(f"hub:{rest} holds no conversations; its fields are {', '.join(first)}")
    if first is not None and field is not None and field not in first:
        raise SourceError(f"hub:{rest} has no field {field!r}; its fields are {', '.join(first)}")
    return found[name]


@contextlib.contextmanager
def named_by(key: str) -> Iterator[None]:
    """Has a SourceError from within begin with the `key`, or option, that names the source: several may name one."""
    try:
        yield
    except SourceError as error:
        raise type(error)(f"{key}: {error}") from error


def is_busy(error: Exception) -> bool:
    """Whether this is a server's answer that another try may not get: too many requests, or a fault of its own."""
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    return status == 429 or status >= 500


def _hub_name(rest: str) -> tuple[str, str | None]:
    owner, name, *config = rest.split("/")
    return f"{owner}/{name}", config[0] if config else None


def _field_of(row: Any, field: str | None, file: str, line: int) -> str | BadRow:
    """The text of one row, or why it has none."""
    if field is None:
        try:
            return conversations.of_row(row)
        except conversations.NoConversation as error:
            return BadRow(error.reason, file, line, str(error))
    if not isinstance(row, dict):
        detail = f"a row is an object with a field {field!r}, this is a {type(row).__name__}"
        return BadRow("not_text", file, line, detail)
    value = row.get(field)
    if value is None:
        missing = f"no field {field!r}; it has {', '.join(map(ascii, row)) or 'none'}"
        return BadRow("missing_field", file, line, f"field {field!r} is null" if field in row else missing)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return BadRow("bad_utf8", file, line, str(error))
    if not isinstance(value, str):
        return BadRow("not_text", file, line, f"{field!r} is a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return BadRow("bad_utf8", file, line, str(error))
    return value
