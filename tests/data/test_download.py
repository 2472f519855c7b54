"""What comes from the Hub is on disk before it is read, however often the connection fails. The Hub is a stand-in."""

import json
import shutil
import sys

import pytest

from data import sources
from data.preparation import download
from data.preparation.download import downloaded
from data.sources import SourceError

ROWS = [{"text": f"row {n} " + "word " * 10, "id": n} for n in range(500)]


class FlakyStream:
    """A datasets.IterableDataset that loses its connection after some rows, again and again."""

    def __init__(self, fail_after: list[int]):
        self.position, self._fail_after = 0, fail_after
        self.served = 0

    def load_state_dict(self, state):
        self.position = state["position"]

    def state_dict(self):
        return {"position": self.position}

    def __iter__(self):
        left = self._fail_after.pop(0) if self._fail_after else 10**9
        while self.position < len(ROWS):
            if left == 0:
                raise ConnectionError("connection reset by peer")
            left -= 1
            self.served += 1
            self.position += 1
            yield ROWS[self.position - 1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "PART_BYTES", 2000)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)


def served(monkeypatch, fail_after: list[int]) -> list[FlakyStream]:
    streams = []

    def open_hub(*_):
        streams.append(FlakyStream(fail_after))
        return streams[-1]

    monkeypatch.setattr(sources, "open_hub", open_hub)
    return streams


def test_a_download_goes_on_where_the_connection_failed(tmp_path, monkeypatch):
    streams = served(monkeypatch, [120, 3, 200])
    log = []
    source = downloaded("hub:owner/name", "text", "train", None, tmp_path, log.append)
    assert list(sources.documents(source)) == [row["text"] for row in ROWS]
    assert len(streams) == 4 and len([line for line in log if "connection reset by peer; trying again" in line]) == 3
    assert sum(stream.served for stream in streams) < 600  # only what was in no part yet is fetched again
    assert downloaded("hub:owner/name", "text", "train", None, tmp_path, log.append) == source
    assert len(streams) == 4


def test_a_killed_download_goes_on_too(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    served(monkeypatch, [])
    monkeypatch.setattr(download, "_write_part", lambda *a, _write=download._write_part: (_write(*a), killed()))
    with pytest.raises(KeyboardInterrupt):
        downloaded("hub:owner/name", "text", "train", None, tmp_path, print)
    monkeypatch.undo()
    monkeypatch.setattr(download, "PART_BYTES", 2000)
    streams = served(monkeypatch, [])
    source = downloaded("hub:owner/name", "text", "train", None, tmp_path, print)
    assert list(sources.documents(source)) == [row["text"] for row in ROWS]
    assert 0 < streams[0].served < 500


def test_a_connection_that_never_comes_is_an_error_that_keeps_what_there_is(tmp_path, monkeypatch):
    served(monkeypatch, [100] + [0] * 20)
    with pytest.raises(SourceError, match="cannot be reached.*rows that are downloaded so far are kept"):
        downloaded("hub:owner/name", "text", "train", None, tmp_path, lambda _: None)
    assert len(list((tmp_path / "hub-train").glob("part-*"))) >= 2


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("damage", ["delete", "cut", "flip", "{}", "[]"])
def test_a_part_that_was_damaged_since_is_fetched_again(tmp_path, monkeypatch, finished, which, damage):
    """With those behind it, for the position behind those before it is known."""
    streams = served(monkeypatch, [] if finished else [300] + [0] * (download.TRIES - 1))
    try:
        source = downloaded("hub:owner/name", "text", "train", None, tmp_path, print)
    except SourceError:
        assert not finished
    streams.clear()
    parts = sorted((tmp_path / "hub-train").glob("part-*"))
    before = sum(json.loads((part / download.ABOUT).read_text())["rows"] for part in parts[: which % len(parts)])
    values = parts[which] / download.VALUES
    data = bytearray(values.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        shutil.rmtree(parts[which])
    elif damage in ("{}", "[]"):
        (parts[which] / download.ABOUT).write_text(damage)
    else:
        values.write_bytes(data if damage == "flip" else data[:-9])
    log = []
    source = downloaded("hub:owner/name", "text", "train", None, tmp_path, log.append)
    assert list(sources.documents(source)) == [row["text"] for row in ROWS]
    noticed = [line for line in log if "WARNING" in line and str(parts[which]) in line]
    assert len(noticed) == (damage != "delete" or which != -1)  # a last part that is gone may never have been there
    assert len(streams) == 1 and streams[0].served == len(ROWS) - before
    assert downloaded("hub:owner/name", "text", "train", None, tmp_path, log.append) == source and len(streams) == 1


def test_what_is_no_text_keeps_its_reason(tmp_path, monkeypatch):
    rows = [{"text": value} for value in ("good", 5, None, "half \ud83d", b"\xff", b"bytes", ["a"], "end")]
    monkeypatch.setattr(f"{__name__}.ROWS", rows)
    served(monkeypatch, [])
    source = downloaded("hub:owner/name", "text", "train", 3, tmp_path, print)
    found = [row.reason if isinstance(row, sources.BadRow) else row for row in sources.documents(source)]
    assert found == ["good", "not_text", "missing_field", "bad_utf8", "bad_utf8", "bytes", "not_text", "end"]
    details = [row.detail for row in sources.documents(source) if isinstance(row, sources.BadRow)]
    assert (details[0], details[1]) == ("'text' is a int, not text", "field 'text' is null")


def test_without_a_network_each_try_is_one_line(tmp_path, run):
    """The clients that the Hub is read with would tell of every retry of theirs."""
    script = """
import sys, time
from pathlib import Path
from data.preparation import download
time.sleep = lambda _seconds: None
try:
    download.downloaded("hub:owner/name", "text", "train", None, Path(sys.argv[1]), print)
except Exception as error:
    print(error)
"""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    done = run(sys.executable, "-c", script, str(tmp_path), timeout=60, **nowhere)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", download.TRIES), done
    assert all("trying again in" in line for line in lines[:-1]) and "cannot be reached" in lines[-1]


def test_no_more_is_fetched_than_is_asked_for(tmp_path, monkeypatch):
    streams = served(monkeypatch, [])
    source = downloaded("hub:owner/name", "text", "train", 70, tmp_path, print)
    assert list(sources.documents(source)) == [row["text"] for row in ROWS[:70]] and streams[0].served == 70


def test_other_sources_are_left_alone(tmp_path):
    assert downloaded("jsonl:a.jsonl", "text", "train", None, tmp_path, print) == "jsonl:a.jsonl"
    assert list(tmp_path.iterdir()) == []
