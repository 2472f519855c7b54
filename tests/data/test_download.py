"""What comes from the Hub is on disk before it is read, however often the connection fails. The Hub is a stand-in."""

import json

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
    assert json.loads((tmp_path / "hub-train" / "state.json").read_text())["rows"] > 50


def test_no_more_is_fetched_than_is_asked_for(tmp_path, monkeypatch):
    streams = served(monkeypatch, [])
    source = downloaded("hub:owner/name", "text", "train", 70, tmp_path, print)
    assert list(sources.documents(source)) == [row["text"] for row in ROWS[:70]] and streams[0].served == 70


def test_other_sources_are_left_alone(tmp_path):
    assert downloaded("jsonl:a.jsonl", "text", "train", None, tmp_path, print) == "jsonl:a.jsonl"
    assert list(tmp_path.iterdir()) == []
