"""Documents from anywhere, as one stream: JSON lines, parquet, plain text, the Hub, or the embedded generator.

A source is written "KIND:REST", for example `jsonl:corpus/*.jsonl`; a file of JSON lines may also be one JSON array,
and files of lines and of text may be compressed (gzip, zstd, bzip2, lz4, xz; storage/inputs.py), which are read as
streams. Of a parquet file only the columns that are asked for are read.
What comes of a row is the text in the column `field` or, where `field` is None, a conversation (data/conversations.py).
A row that is neither (bad JSON, no such field, not text, not UTF-8) comes out of the stream as a `BadRow` in its place,
so that the caller counts it and goes on; a file that cannot be read at all raises `SourceError`. Files are read sorted
by name, in bounded memory (one document, or one batch of a parquet row group, at a time). `pieces` cuts a source into
parts of about one size that can be read in any order by any number of processes, and together give every row once;
`together` puts small ones side by side, so that a folder of many files costs what its bytes cost.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from data import conversations, embedded
from storage import inputs

Split = Literal["train", "valid", "test"]

KINDS = ("embedded", "jsonl", "parquet", "text", "hub")
SEPARATOR = "<|endoftext|>"  # a line of a text file that is exactly this ends a document
PARQUET_BATCH = 1024  # rows decoded at a time
PIECE_BYTES, PIECE_DOCUMENTS = 8_000_000, 2500  # of a file, and of a generator
LAYOUT = 2  # of pieces, those that lie together included: raise it when sources are cut otherwise
OPENING = 4_000  # bytes that are read in the time that it takes to open a file
EMBEDDED_BYTES = 1_000  # of a generated document, about, with what it costs to make
ROW = "row as JSON"  # the column of a conversation that was downloaded
NO_TEXT = "type of what is no text"  # a second column, with a name where the value of a downloaded row was no text
LONGEST_ROW = 256_000_000  # bytes of a line, or of a text document: more is no document, but a mistake
HUB_FILES = {".parquet", ".jsonl", ".json", ".csv", ".txt", ".arrow", ".gz", ".zst"}  # of a folder, that hold rows
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
    size: int = 0  # bytes of text that are in it, about


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
    return inputs.find(rest)


def fault(source: str) -> str | None:
    """What to change in `source` before it can be read, as far as this machine's files tell; None if nothing."""
    try:
        kind, rest = parse(source)
    except ValueError as error:
        return str(error)
    if kind == "embedded":
        return None if rest in embedded.CORPORA else "the embedded corpora are " + ", ".join(embedded.CORPORA)
    if kind == "hub":
        if Path(rest).expanduser().is_dir():
            return _fault_of_files(path for path in files(source) if path.suffix in HUB_FILES)
        if _HUB_NAME.fullmatch(rest):
            return None
        return "write hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, or hub: and an existing folder with a data set"
    if Path(rest).expanduser().is_dir():
        return f"this is a folder: name its files, for example {kind}:{rest.rstrip('/')}/*"
    found = files(source)
    if not found:
        return "no such file here: name an existing file, or a pattern that matches some"
    return _fault_of_files(found)


def _fault_of_files(paths: Iterable[Path]) -> str | None:
    return next((remedy for path in paths if (remedy := inputs.fault(path))), None)


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
            found += [dataclasses.replace(whole, start=first, stop=stop, size=size) for first, stop, size in groups]
        elif whole.kind == "embedded":
            starts = range(0, max(whole.stop, 1), PIECE_DOCUMENTS)
            ends = [min(start + PIECE_DOCUMENTS, whole.stop) for start in starts]
            found += [dataclasses.replace(whole, start=start, stop=end, size=(end - start) * EMBEDDED_BYTES)
                      for start, end in zip(starts, ends, strict=True)]  # fmt: skip
        elif whole.kind == "hub":
            found.append(whole)
        else:
            found += _of_file(whole)
    return found


def _of_file(whole: Piece) -> list[Piece]:
    """The pieces of a file of lines: parts of it, unless it can only be read from its beginning."""
    path = Path(whole.place)
    with _named(whole):
        size = path.stat().st_size
        if inputs.compression(path) or (whole.kind == "jsonl" and _is_array(path)):
            return [dataclasses.replace(whole, size=inputs.text_bytes(path))]
    ends = [min(start + PIECE_BYTES, size) for start in range(0, max(size, 1), PIECE_BYTES)]
    return [dataclasses.replace(whole, start=start, stop=stop, size=stop - start)
            for start, stop in itertools.pairwise([0, *ends])]  # fmt: skip


def together(found: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    """The same pieces in the same order, neighbours of files side by side as long as they are one piece's work."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in found:
        work = max(piece.size, OPENING)
        joins = piece.kind not in ("embedded", "hub") and work <= room and groups[-1][-1].split == piece.split
        if joins:
            groups[-1].append(piece)
        else:
            groups.append([piece])
            room = PIECE_BYTES
        room -= work
    return [tuple(group) for group in groups]


def read_piece(piece: Piece, field: str | None = "text") -> Iterator[str | BadRow]:
    """The documents of one piece, bad rows in their places. Raises SourceError where it cannot be read."""
    path = Path(piece.place)
    with _named(piece):
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


@contextlib.contextmanager
def _named(piece: Piece) -> Iterator[None]:
    """Whatever cannot be read within is said to be that piece's place."""
    try:
        yield
    except OSError as error:  # pyarrow raises OSError too, for pages and streams that do not decompress
        raise SourceError(f"{piece.kind}:{piece.place} cannot be read: {error}") from error


@functools.cache
def lines_of(piece: Piece) -> int:
    """How many lines of its file, or rows of its table, lie before the next piece."""
    if piece.kind == "parquet":
        return _parquet_rows(Path(piece.place), piece.start, piece.stop)
    if piece.kind not in ("jsonl", "text") or (piece.kind == "jsonl" and _is_array(Path(piece.place))):
        return 0
    lines = 0
    with inputs.reading(Path(piece.place)) as file:
        here, end = _to_line_start(file, piece.start), None
        if piece.stop is not None:
            end = _to_line_start(file, piece.stop)
            file.seek(here)
        while chunk := file.read(2**20 if end is None else min(2**20, end - here)):
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
    if remedy := _fault_of_files(paths):
        raise BadContentError(f"{source}: {remedy}")
    return [Piece(kind, str(path), split=split) for path in paths]


def _first(stream: Iterator[str | BadRow], count: int) -> Iterator[str | BadRow]:
    while count > 0:
        item = next(stream, None)
        if item is None:
            return
        yield item
        count -= isinstance(item, str)


def _to_line_start(file: IO[bytes], offset: int) -> int:
    """Move a file that was just opened to the first line that begins at `offset` or behind it; returns where that
    is."""
    if offset == 0:
        return 0  # and a compressed file lets itself be read from there alone
    file.seek(offset - 1)
    while (part := file.readline(2**20)) and not part.endswith(b"\n"):
        pass
    return file.tell()


def _lines(file: IO[bytes], here: int) -> Iterator[tuple[int, bytes | None]]:
    """(where it begins, line) of the lines of a file that stands at byte `here`; None in place of one that is longer
    than any row may be. In the end, where the file ends, and no bytes."""
    while line := file.readline(LONGEST_ROW):
        if len(line) < LONGEST_ROW or line.endswith(b"\n"):
            yield here, line
            here += len(line)
            continue
        yield here, None
        here += len(line)
        while (part := file.readline(2**20)) and not part.endswith(b"\n"):
            here += len(part)
        here += len(part)
    yield here, b""


@functools.lru_cache(10_000)
def _is_array(path: Path) -> bool:
    """Whether a file is one JSON array, and not lines of which the first happens to be one."""
    with inputs.reading(path) as file:
        begins = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begins.startswith(b"["):
        return False
    with inputs.reading(path) as file:
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
    with inputs.reading(path) as file:
        data = file.read(LONGEST_ROW + 1)
    if len(data) > LONGEST_ROW:
        raise SourceError(f"jsonl:{path} is one JSON array of more than {LONGEST_ROW:,} bytes, which is read at once: "
                          "write one object a line")  # fmt: skip
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadContentError(f"jsonl:{path} begins as one JSON array, and is none: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _field_of(row, field, str(path), number)


def _jsonl_documents(path: Path, field: str | None, start: int, stop: int | None) -> Iterator[str | BadRow]:
    name = str(path)
    with inputs.reading(path) as file:
        for number, (here, line) in enumerate(_lines(file, _to_line_start(file, start)), start=1):
            if stop is not None and here >= stop:
                return
            if line is None:
                yield BadRow("too_long", name, number, f"longer than {LONGEST_ROW:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if here == 0 else "utf-8")
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


def _parquet_groups(path: Path) -> list[tuple[int, int, int]]:
    """[first, stop) of row groups that together have about one piece's bytes, and these bytes."""
    with _open_parquet(path) as file:
        sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
    cuts, size = [0], 0
    for index, more in enumerate(sizes):
        if size and size + more > PIECE_BYTES:
            cuts.append(index)
            size = 0
        size += more
    return [(first, stop, sum(sizes[first:stop])) for first, stop in itertools.pairwise([*cuts, len(sizes)])]


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
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=groups, columns=[field, NO_TEXT]):
                values, others = _texts(batch.column(field))
                if NO_TEXT in batch.schema.names and field != NO_TEXT:
                    others = batch.column(NO_TEXT).to_pylist()
                for value, other in zip(values, others, strict=True):
                    number += 1
                    if other is not None:
                        yield BadRow("not_text", name, number, f"{field!r} is a {other}, not text")
                    else:
                        yield _field_of({field: value}, field, name, number)
        except pyarrow.ArrowException as error:
            raise SourceError(f"parquet:{path} is damaged after row {number}: {error}") from error


def _texts(column: Any) -> tuple[list[bytes | None], list[str | None]]:
    """The values of a column of any type of text, undecoded, so that one row that is not UTF-8 does not cost the
    others, and None for each; of another type None for each, and the type's name for those that are not null."""
    import pyarrow

    types = pyarrow.types
    if isinstance(column.type, pyarrow.JsonType):
        column = column.storage
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        column = column.cast(pyarrow.large_binary())
    elif not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
              or types.is_fixed_size_binary(kind) or types.is_null(kind)):  # fmt: skip
        return [None] * len(column), [str(kind) if there else None for there in column.is_valid().to_pylist()]
    return column.to_pylist(), [None] * len(column)


def _parquet_conversations(path: Path, start: int, stop: int | None) -> Iterator[str | BadRow]:
    import pyarrow

    with _open_parquet(path) as file:
        groups = list(range(file.metadata.num_row_groups)[start:stop])
        there = [name for name in (ROW, *conversations.COLUMNS) if name in file.schema_arrow.names]
        if not there:
            if rows := sum(file.metadata.row_group(index).num_rows for index in groups):
                detail = f"no conversations; its columns are {', '.join(file.schema_arrow.names)}"
                yield BadRow("missing_field", str(path), 1, detail, count=rows)
            return
        columns = [ROW] if ROW in there else conversations.needed(there, _never_null(file.metadata, groups))
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=groups, columns=columns):
                for row in _rows(batch):
                    number += 1
                    yield _field_of(json.loads(row[ROW]) if ROW in row else row, None, str(path), number)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise SourceError(f"parquet:{path} is damaged after row {number}: {error}") from error


def _never_null(metadata: Any, groups: Iterable[int]) -> set[str]:
    """The columns of which the statistics of these row groups say that no row lacks a value."""
    full: set[str] | None = None
    for index in groups:
        group = metadata.row_group(index)
        parts = [group.column(number) for number in range(group.num_columns)]
        stated = [part for part in parts if part.statistics and part.statistics.has_null_count]
        of_group = {part.path_in_schema.split(".")[0] for part in stated if part.statistics.null_count == 0}
        full = of_group if full is None else full & of_group
    return full or set()


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; where not all of it is UTF-8, its texts are bytes, of which each reader decodes its own."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = {name: [_undecoded(value) for value in batch.column(name)] for name in batch.schema.names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _undecoded(value: Any) -> Any:
    """A pyarrow scalar as plain Python, texts as bytes."""
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar | pyarrow.ExtensionScalar):
        value = value.value
    if value is None or not value.is_valid:
        return None
    if isinstance(value, pyarrow.StructScalar):
        return {name: _undecoded(part) for name, part in value.items()}
    if isinstance(value, pyarrow.ListScalar):  # of any kind
        return [_undecoded(part) for part in value.values]
    return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else value.as_py()


def _text_documents(path: Path, start: int, stop: int | None) -> Iterator[str | BadRow]:
    separator = SEPARATOR.encode()
    with inputs.reading(path) as file:
        here = _to_line_start(file, start)
        if stop is not None and here >= stop:
            return
        inside = here == 0 or _ends_in_separator(file, here)  # of a document of this piece, else of the one before
        lines: list[bytes] = []
        size, first, begins = 0, 1, here
        for number, (at, line) in enumerate(_lines(file, here), start=1):
            if line is None or (line and line.rstrip(b"\r\n") != separator):
                if not inside and stop is not None and at >= stop:
                    return
                if inside:
                    size += LONGEST_ROW if line is None else len(line)
                    if size < LONGEST_ROW:
                        lines.append(line)
                    else:
                        lines.clear()
                continue
            if inside and size >= LONGEST_ROW:
                yield BadRow("too_long", str(path), first, f"longer than {LONGEST_ROW:,} bytes")
            elif inside and (data := b"".join(lines)).strip():
                yield _decoded(data.removeprefix(b"\xef\xbb\xbf") if begins == 0 else data, path, first)
            behind = at + len(line)
            if stop is not None and behind >= stop:
                return
            lines, size, first, begins, inside = [], 0, number + 1, behind, True


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
    if folder.is_dir() and (remedy := fault(f"hub:{rest}")):
        raise BadContentError(f"hub:{rest}: {remedy}")
    owner_and_name, config = (str(folder), None) if folder.is_dir() else _hub_name(rest)
    try:
        found = datasets.load_dataset(owner_and_name, config, streaming=True)
        name = next((name for name in HUB_SPLITS[split] if name in found), None)
        if name is None:
            raise SourceError(f"hub:{rest} has no split {' or '.join(HUB_SPLITS[split])}; it has {', '.join(found)}")
        columns = found[name].column_names
        if columns is None:  # only its rows tell
            columns = list(next(iter(found[name]), {}))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ConnectionError) or is_busy(error):
            raise
        raise SourceError(f"hub:{rest} cannot be read: {error}") from error
    wanted = [name for name in (conversations.COLUMNS if field is None else [field]) if name in columns]
    if columns and not wanted and field is None:
        raise SourceError(f"hub:{rest} holds no conversations; its fields are {', '.join(columns)}")
    if columns and not wanted:
        raise SourceError(f"hub:{rest} has no field {field!r}; its fields are {', '.join(columns)}")
    rows = found[name].select_columns(wanted) if wanted else found[name]
    if rows.features is None:
        return rows
    return rows.cast(datasets.Features({name: _as_bytes(feature) for name, feature in rows.features.items()}))


def _as_bytes(feature: Any) -> Any:
    """A feature of datasets whose texts come undecoded, so that one that is not UTF-8 costs its own row alone."""
    import datasets

    if isinstance(feature, dict):
        return {name: _as_bytes(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_as_bytes(feature.feature))
    is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")
    return datasets.Value("large_binary") if is_text else feature


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
