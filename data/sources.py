"""Documents from anywhere, as one stream: JSON lines, parquet, plain text, the Hub, or the embedded generator.

A source is written "KIND:REST", for example `jsonl:corpus/*.jsonl`. A row that is no document (bad JSON, no such
field, not text, not UTF-8) comes out of the stream as a `BadRow` in its place, so that the caller counts it and goes
on; a file that cannot be read at all raises `SourceError`. Files are read one after the other, sorted by name, in
bounded memory (one document, or one batch of a parquet row group, at a time).
"""

import dataclasses
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data import embedded

Split = Literal["train", "valid"]

KINDS = ("embedded", "jsonl", "parquet", "text", "hub")
SEPARATOR = "<|endoftext|>"  # a line of a text file that is exactly this ends a document
PARQUET_BATCH = 1024  # rows decoded at a time
# The split of a Hub data set for each side: the first of these that it has. Never "test", which is for evaluation.
HUB_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "val", "dev")}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)?")


class SourceError(Exception):
    """A source as a whole cannot be read: it is named, with what would be right."""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that is no document: `reason` is one word to count by, `where` is "file:line", the rest is for people."""

    reason: Literal["bad_json", "bad_utf8", "missing_field", "not_text"]
    where: str
    detail: str
    count: int = 1


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
        return None if rest in embedded.KINDS else "the embedded corpora are " + ", ".join(embedded.KINDS)
    if kind == "hub":
        if Path(rest).expanduser().is_dir() or _HUB_NAME.fullmatch(rest):
            return None
        return "write hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, or hub: and an existing folder with a data set"
    if Path(rest).expanduser().is_dir():
        return f"this is a folder: name its files, for example {kind}:{rest.rstrip('/')}/*"
    unreadable = [path for path in files(source) if not os.access(path, os.R_OK)]
    if unreadable:
        return f"make {unreadable[0]} readable"
    return None if files(source) else "no such file here: name an existing file, or a pattern that matches some"


def documents(
    source: str, field: str = "text", split: Split = "train", count: int | None = None, seed: int = 0
) -> Iterator[str | BadRow]:
    """The documents of a source in a fixed order, bad rows in their places.

    Args:
        source: "KIND:REST".
        field: column of JSON lines, parquet and Hub rows that holds the text.
        split: side of an embedded or Hub source; files have no sides and are read whole for either.
        count: stop after this many documents (bad rows not counted); embedded sources never end without it.
        seed: of the embedded generator.

    Raises:
        SourceError: a file or data set cannot be read.
        ValueError: `source` is not of the form KIND:REST.
    """
    kind, rest = parse(source)
    if kind == "embedded":
        stream: Iterator[str | BadRow] = embedded.documents(rest, split, count, seed)
    elif kind == "hub":
        stream = _hub_documents(rest, field, split)
    else:
        paths = files(source)
        if not paths:
            raise SourceError(f"{source}: no such file; name an existing file, or a pattern that matches some")
        stream = itertools.chain.from_iterable(read_file(kind, path, field) for path in paths)
    return stream if count is None else _first(stream, count)


def read_file(kind: str, path: Path, field: str = "text") -> Iterator[str | BadRow]:
    """The documents of one file of kind jsonl, parquet or text. Raises SourceError where it cannot be read."""
    try:
        if kind == "jsonl":
            yield from _jsonl_documents(path, field)
        elif kind == "parquet":
            yield from _parquet_documents(path, field)
        else:
            yield from _text_documents(path)
    except OSError as error:  # pyarrow raises OSError too, for pages that do not decompress
        raise SourceError(f"{kind}:{path} cannot be read: {error}") from error


def _first(stream: Iterator[str | BadRow], count: int) -> Iterator[str | BadRow]:
    while count > 0:
        item = next(stream, None)
        if item is None:
            return
        yield item
        count -= isinstance(item, str)


def _jsonl_documents(path: Path, field: str) -> Iterator[str | BadRow]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield BadRow("bad_utf8", where, str(error))
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield BadRow("bad_json", where, f"{error}; it begins {text[:60]!r}")
                continue
            yield _field_of(row, field, where)


def _parquet_documents(path: Path, field: str) -> Iterator[str | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"parquet:{path} is not a whole parquet file: {error}") from error
    with file:
        if field not in file.schema_arrow.names:
            if rows := file.metadata.num_rows:
                detail = f"its columns are {', '.join(file.schema_arrow.names)}"
                yield BadRow("missing_field", f"{path}:1", f"no column {field!r}; {detail}", count=rows)
            return
        kind = file.schema_arrow.field(field).type
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH, columns=[field]):
                for value in _parquet_values(batch.column(0), kind):
                    number += 1
                    yield _field_of({field: value}, field, f"{path}:{number}")
        except pyarrow.ArrowException as error:
            raise SourceError(f"parquet:{path} is damaged after row {number}: {error}") from error


def _parquet_values(column: Any, kind: Any) -> list[Any]:
    """Values of one batch; text as undecoded bytes, so that one row that is not UTF-8 does not cost the others."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _text_documents(path: Path) -> Iterator[str | BadRow]:
    separator = SEPARATOR.encode()
    lines: list[bytes] = []
    start = 1
    with open(path, "rb") as file:
        for number, line in enumerate(itertools.chain(file, [separator]), start=1):
            if line.rstrip(b"\r\n") != separator:
                lines.append(line)
                continue
            data = b"".join(lines)
            if data.strip():
                yield _decoded(data.removeprefix(b"\xef\xbb\xbf") if start == 1 else data, path, start)
            lines, start = [], number + 1


def _decoded(data: bytes, path: Path, start: int) -> str | BadRow:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = start + data[: error.start].count(b"\n")
        return BadRow("bad_utf8", f"{path}:{line}", str(error))


def _hub_documents(rest: str, field: str, split: Split) -> Iterator[str | BadRow]:
    import datasets

    folder = Path(rest).expanduser()
    owner_and_name, config = (str(folder), None) if folder.is_dir() else _hub_name(rest)
    try:
        found = datasets.load_dataset(owner_and_name, config, streaming=True)
        name = next((name for name in HUB_SPLITS[split] if name in found), None)
        if name is None:
            raise SourceError(f"hub:{rest} has no split {' or '.join(HUB_SPLITS[split])}; it has {', '.join(found)}")
        for number, row in enumerate(found[name], start=1):
            if number == 1 and field not in row:
                raise SourceError(f"hub:{rest} has no field {field!r}; its fields are {', '.join(row)}")
            yield _field_of(row, field, f"hub:{rest} {name}:{number}")
    except ConnectionError as error:
        raise SourceError(
            f"hub:{rest} cannot be reached: {error}. Go online for this one preparation, or name a local folder or file"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"hub:{rest} cannot be read: {error}") from error


def _hub_name(rest: str) -> tuple[str, str | None]:
    owner, name, *config = rest.split("/")
    return f"{owner}/{name}", config[0] if config else None


def _field_of(row: Any, field: str, where: str) -> str | BadRow:
    """The text of one row, or why it has none."""
    if not isinstance(row, dict):
        return BadRow("not_text", where, f"a row is an object with a field {field!r}, this is a {type(row).__name__}")
    value = row.get(field)
    if value is None:
        return BadRow("missing_field", where, f"no field {field!r}; it has {', '.join(map(str, row)) or 'none'}")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return BadRow("bad_utf8", where, str(error))
    if not isinstance(value, str):
        return BadRow("not_text", where, f"{field!r} is a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return BadRow("bad_utf8", where, str(error))
    return value
