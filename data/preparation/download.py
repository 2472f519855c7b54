"""Data sets of the Hub -> local parquet files, so that neither preparation nor training depends on the network.

Rows are streamed; a part is written every so many megabytes, together with where the stream stood, so that a download
that was interrupted goes on with the next part. A connection that fails is tried again, later each time.
"""

import errno
import glob
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data import sources
from storage import folder

PART_BYTES = 64_000_000  # of text
TRIES, FIRST_PAUSE = 6, 2.0  # seconds, doubled each time: a minute in all
STATE = "state.json"  # rows and the stream's position behind the last part; `finished`

Log = Callable[[str], object]


def downloaded(source: str, field: str, split: sources.Split, count: int | None, work: Path, log: Log) -> str:
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
    target.mkdir(parents=True, exist_ok=True)
    state = _state(target)
    if not state["finished"]:
        _download(rest, field, split, count, target, state, log)
    return f"parquet:{glob.escape(str(target))}/*.parquet"


def _download(rest: str, field: str, split: sources.Split, count: int | None, target: Path, state: dict[str, Any],
              log: Log) -> None:  # fmt: skip
    if state["rows"]:
        log(f"hub:{rest}: going on after {state['rows']:,} rows")
    tries = 0
    while True:
        parts_before = state["parts"]
        try:
            for rows, position, finished in _parts(rest, field, split, count, state):
                _write_part(target, state, field, rows, position, finished)
            return
        except Exception as error:
            if not _may_pass(error):
                raise _cannot_be_read(rest, error) from error
            tries = 1 if state["parts"] > parts_before else tries + 1
            if tries == TRIES:
                raise sources.SourceError(
                    f"hub:{rest} cannot be reached: {error}. {sources.OFFLINE}; the {state['rows']:,} rows that are "
                    "downloaded so far are kept"
                ) from error
            pause = FIRST_PAUSE * 2 ** (tries - 1)
            log(f"hub:{rest}: {type(error).__name__}: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)


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
    rest: str, field: str, split: sources.Split, count: int | None, state: dict[str, Any]
) -> Iterator[tuple[list[Any], Any, bool]]:
    """(values of `field`, position behind them, whether they are the last), part after part."""
    stream = sources.open_hub(rest, field, split)
    if state["position"] is not None:
        stream.load_state_dict(state["position"])
    values: list[Any] = []
    size, texts = 0, state["texts"]
    for row in stream:
        value = row.get(field)
        values.append(value)
        size += len(value) if isinstance(value, str | bytes) else 8
        texts += _text(value) is not None
        enough = count is not None and texts >= count
        if size >= PART_BYTES or enough:
            yield values, stream.state_dict(), enough
            values, size = [], 0
        if enough:
            return
    yield values, stream.state_dict(), True


def _write_part(target: Path, state: dict[str, Any], field: str, values: list[Any], position: Any, last: bool) -> None:
    """Write one part, then that it is there: a part that nobody knows of is written again."""
    import pyarrow
    import pyarrow.parquet

    texts = [_text(value) for value in values]
    table = pyarrow.table({field: pyarrow.array(texts, type=pyarrow.large_string())})
    with folder.replacing(target / f"part-{state['parts']:05d}.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    state["parts"] += 1
    state["rows"] += len(values)
    state["texts"] += sum(text is not None for text in texts)
    state["position"], state["finished"] = position, last
    folder.write_file(target / STATE, json.dumps(state))


def _text(value: Any) -> str | None:
    """A row's text, None if it has none that UTF-8 can hold."""
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _state(target: Path) -> dict[str, Any]:
    try:
        return json.loads((target / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"parts": 0, "rows": 0, "texts": 0, "position": None, "finished": False}
