"""Data sets of the Hub -> local parquet files, so that neither preparation nor training depends on the network.

Rows are streamed; a part is written every so many megabytes, together with where the stream stood, so that a download
that was interrupted goes on with the next part, and one of which a part is damaged goes on from there. A connection
that fails is tried again, later each time.
"""

import contextlib
import errno
import glob
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data import conversations, sources
from storage import folder

PART_BYTES = 64_000_000  # of text
TRIES, FIRST_PAUSE = 3, 2.0  # seconds, doubled each time; in each, huggingface_hub itself tries for half a minute
# Of a part: its values, and their number, how many of them are texts, the stream's position behind them, `last`.
VALUES, ABOUT = "values.parquet", "about.json"

Log = Callable[[str], object]


def downloaded(source: str, field: str | None, split: sources.Split, count: int | None, work: Path, log: Log) -> str:
    """The source to read in place of `source`: itself, or the parquet files that it was downloaded into.

    Args:
        count: so many rows are enough; rows without text are not counted.

    Raises:
        sources.SourceError: the data set cannot be reached or read.
    """
    kind, rest = sources.parse(source)
    if kind != "hub":
        return source
    target = work / f"hub-{split}"
    parts = _whole_parts(rest, target, log)
    if not parts or not parts[-1]["last"]:
        _download(rest, field, split, count, target, parts, log)
    return f"parquet:{glob.escape(str(target))}/part-*/{VALUES}"


def _whole_parts(rest: str, target: Path, log: Log) -> list[dict[str, Any]]:
    """What is to be known of each part, up to the first that is missing or damaged; those behind that are removed."""
    found: list[dict[str, Any]] = []
    there = sorted(target.glob("part-*"))
    while there:
        path = _part(target, len(found))
        if problems := folder.verify(path):
            log(f"WARNING: {problems[0]}: hub:{rest} is downloaded again from there")
            break
        found.append(json.loads((path / ABOUT).read_text(encoding="utf-8")))
        there.remove(path)
    for path in there:
        folder.remove(path)
    return found


def _part(target: Path, number: int) -> Path:
    return target / f"part-{number:05d}"


def _download(
    rest: str, field: str | None, split: sources.Split, count: int | None, target: Path, parts: list[dict[str, Any]],
    log: Log,
) -> None:  # fmt: skip
    if parts:
        log(f"hub:{rest}: going on after {_sum(parts, 'rows'):,} rows")
    tries = 0
    while True:
        before = len(parts)
        try:
            with _quietly():
                for values, position, last in _parts(rest, field, split, count, parts):
                    parts.append(_write_part(_part(target, len(parts)), field, values, position, last))
            return
        except Exception as error:
            if not _may_pass(error):
                raise _cannot_be_read(rest, error) from error
            tries = 1 if len(parts) > before else tries + 1
            if tries == TRIES:
                raise sources.SourceError(
                    f"hub:{rest} cannot be reached: {error}. {sources.OFFLINE}; the {_sum(parts, 'rows'):,} rows that "
                    "are downloaded so far are kept"
                ) from error
            pause = FIRST_PAUSE * 2 ** (tries - 1)
            log(f"hub:{rest}: {type(error).__name__}: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, huggingface_hub and datasets keep what they say of their own retries to themselves."""
    import datasets
    import huggingface_hub.utils

    loggers = (datasets.logging, huggingface_hub.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def _sum(parts: list[dict[str, Any]], what: str) -> int:
    return sum(part[what] for part in parts)


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: the network, or a server that is busy."""
    if isinstance(error, sources.SourceError):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}  # of datasets, httpx, aiohttp and requests, none imported
    if names & {"ConnectionError", "TimeoutError", "TransportError", "ClientError"}:
        return True
    return sources.is_busy(error)


def _cannot_be_read(rest: str, error: Exception) -> Exception:
    """What to raise for an error that will not pass: one that names the data set, if its data is to blame."""
    import datasets

    blame = isinstance(error, OSError | ValueError | datasets.exceptions.DatasetsError) and not _is_of_disk(error)
    return sources.SourceError(f"hub:{rest} cannot be read: {error}") if blame else error


def _is_of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _parts(
    rest: str, field: str | None, split: sources.Split, count: int | None, parts: list[dict[str, Any]]
) -> Iterator[tuple[list[Any], Any, bool]]:
    """(values of `field`, position behind them, whether they are the last) of each part that is not there yet."""
    stream = sources.open_hub(rest, field, split)
    if parts:
        stream.load_state_dict(parts[-1]["position"])
    values: list[Any] = []
    size, texts = 0, _sum(parts, "texts")
    for row in stream:
        value = _value_of(row, field)
        values.append(value)
        size += len(value) if isinstance(value, str | bytes) else 8
        texts += _is_text(value)
        enough = count is not None and texts >= count
        if size >= PART_BYTES or enough:
            yield values, stream.state_dict(), enough
            values, size = [], 0
        if enough:
            return
    yield values, stream.state_dict(), True


def _value_of(row: dict[str, Any], field: str | None) -> Any:
    """What is kept of a row: the field, or of a conversation all columns that hold one, as JSON."""
    if field is not None:
        return row.get(field)
    kept = {name: row[name] for name in conversations.COLUMNS if name in row}
    return json.dumps(kept, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    """What JSON has no form of: bytes as text, in which those that are not UTF-8 are half surrogates, as which the row
    is refused when it is read; anything else as Python writes it."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else repr(value)


def _write_part(path: Path, field: str | None, values: list[Any], position: Any, last: bool) -> dict[str, Any]:
    """Write one part, with every value that is no text as sources.NO_TEXT says; returns what is to be known of it."""
    import pyarrow
    import pyarrow.parquet

    data = [value.encode(errors="surrogatepass") if isinstance(value, str) else value for value in values]
    others = [None if value is None or isinstance(value, bytes) else type(value).__name__ for value in data]
    texts = [value if isinstance(value, bytes) else None for value in data]
    table = pyarrow.table({
        field or sources.ROW: pyarrow.array(texts, type=pyarrow.large_binary()),
        sources.NO_TEXT: pyarrow.array(others, type=pyarrow.string()),
    })  # fmt: skip
    about = {"rows": len(values), "texts": sum(map(_is_text, values)), "position": position, "last": last}
    with folder.write(path) as temporary:
        pyarrow.parquet.write_table(table, temporary / VALUES, compression="zstd", write_page_checksum=True)
        (temporary / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return about


def _is_text(value: Any) -> bool:
    """Whether a row has text, in UTF-8 or such as UTF-8 can hold."""
    try:
        value.decode() if isinstance(value, bytes) else value.encode()
    except (AttributeError, UnicodeError):
        return False
    return True
