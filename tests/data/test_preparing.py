"""Preparation in many pieces and processes, killed and resumed, is preparation in one; what it drops is counted."""

import collections
import errno
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import settings
from data import inspect, prepare, publish, shards, sources
from data.preparation import documents as documents_
from data.preparation import download
from data.preparation.select_documents import Selection
from data.sources import SourceError
from storage import folder
from tests import warm
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def documents(count: int) -> list[str]:
    draw = random.Random(1)
    return [f"Story {n}: " + " ".join(draw.choices(["dog", "cat", "sun", "sea", "ran", "and", "saw", "red"], k=30))
            for n in range(count)]  # fmt: skip


def write(path: Path, rows: list) -> str:
    lines = [row if row.startswith("{") else json.dumps({"text": row}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return f"jsonl:{path}"


def config(tmp_path: Path, source: dict, where: str = "shards", **data) -> prepare.Config:
    raw = {"data": {"shards": str(tmp_path / where), "sources": {"a": source}, "valid_fraction": 0.1, **data}}
    return settings.validate(prepare.Config, {**raw, "tokenizer": {"path": str(tokenizer(tmp_path))}})


def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer"
    if not path.exists():
        Tokenizer.train(documents(100), 1024).save(path)
    return path


def prepared(found: prepare.Config, log=lambda _: None) -> Path:
    return prepare.prepare(found.data, found.tokenizer, log).sources["a"]


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != folder.MANIFEST}


@pytest.fixture
def many_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 5_000)
    monkeypatch.setattr(documents_, "WORTH_PROCESSES", 0)


def test_the_shards_do_not_depend_on_pieces_and_processes(tmp_path, monkeypatch):
    texts = documents(900)
    texts[300:300] = ["{broken", texts[17], "{also broken"]
    source = {"from": write(tmp_path / "a.jsonl", texts), "documents": 800}
    one = content(prepared(config(tmp_path, source, "one", near_duplicates=0.8, workers=1)))
    monkeypatch.setattr(sources, "PIECE_BYTES", 7_000)
    monkeypatch.setattr(documents_, "WORTH_PROCESSES", 0)
    for workers in (1, 3):
        log = []
        where = prepared(config(tmp_path, source, f"many-{workers}", near_duplicates=0.8, workers=workers), log.append)
        assert content(where) == one
    rows = [json.loads(line) for line in one[shards.QUARANTINE].decode().splitlines()]
    assert [(row["reason"], row["place"]) for row in rows] == [
        ("bad_json", f"{tmp_path}/a.jsonl:301"), ("bad_json", f"{tmp_path}/a.jsonl:303")
    ]  # fmt: skip
    assert json.loads(one["dataset.json"])["dropped"] == {"bad_json": 2, "duplicate": 1}


def test_newcomer_a_folder_of_many_small_files_is_prepared_like_one_file(tmp_path, operations):
    """The same shards, one table of rows, and twice the work for twice the files."""
    (tmp_path / "books").mkdir()
    spent = {}
    for count in (150, 300):
        texts = documents(count)
        for number, text in enumerate(texts):
            (tmp_path / "books" / f"{number:04d}.txt").write_text(text)
        one = content(prepared(config(tmp_path, {"from": write(tmp_path / "one.jsonl", texts)}, f"one-{count}")))
        found = config(tmp_path, {"from": f"text:{tmp_path}/books/*.txt"}, f"many-{count}")
        operations.clear()
        many = content(prepared(found))
        spent[count] = operations.copy()
        assert {name: data for name, data in many.items() if name != "dataset.json"} == {
            name: data for name, data in one.items() if name != "dataset.json"
        }
    assert spent[300]["open"] - spent[150]["open"] <= 150 * 10
    for name in ("os.listdir", "os.scandir", "os.mkdir", "os.rename", "fsync"):
        assert spent[300][name] <= spent[150][name] + 5, name


@pytest.fixture
def operations(monkeypatch) -> collections.Counter:
    """How often this process does what costs time on a disk."""
    found: collections.Counter = collections.Counter()
    watched = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename")
    active = [True]
    sys.addaudithook(lambda event, _: active and event in watched and found.update([event]))  # a hook stays for good
    monkeypatch.setattr(os, "fsync", lambda descriptor, _fsync=os.fsync: (found.update(["fsync"]), _fsync(descriptor)))
    yield found
    active.clear()


def test_newcomer_malformed_rows_of_many_files_are_placed_without_counting_again(tmp_path, monkeypatch):
    """Each in its own file, with lines counted from the beginning of that; no piece is counted twice."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 6_000)
    expected = []
    (tmp_path / "books").mkdir()
    for number in range(12):
        rows = documents(100)[: 5 if number % 2 else 100]
        for line in (2, len(rows) - 1):
            rows[line] = "{no"
            expected.append(f"{tmp_path}/books/{number:02d}.jsonl:{line + 1}")
        write(tmp_path / "books" / f"{number:02d}.jsonl", rows)
    counted = []
    monkeypatch.setattr(sources, "lines_of", lambda piece, _of=sources.lines_of: (counted.append(piece), _of(piece))[1])
    made = prepared(config(tmp_path, {"from": f"jsonl:{tmp_path}/books/*"}, most_malformed=0.5))
    found = [json.loads(line)["place"] for line in (made / shards.QUARANTINE).read_text().splitlines()]
    assert found == expected
    assert len(counted) == len(set(counted)) > 6


def test_newcomer_compressed_files_are_prepared_resumed_and_placed_like_plain_ones(tmp_path, many_pieces, monkeypatch):
    texts = documents(300)
    texts[250] = "{no"
    parts = {"a": texts[:100], "b": texts[100:200], "c": texts[200:]}
    (tmp_path / "plain").mkdir(), (tmp_path / "packed").mkdir()
    for name, rows in parts.items():
        write(tmp_path / "plain" / f"{name}.jsonl", rows)
        packed = gzip.compress((tmp_path / "plain" / f"{name}.jsonl").read_bytes())
        (tmp_path / "packed" / f"{name}.jsonl.gz").write_bytes(packed)
    plain = content(prepared(config(tmp_path, {"from": f"jsonl:{tmp_path}/plain/*"}, "one", workers=1)))
    found = config(tmp_path, {"from": f"jsonl:{tmp_path}/packed/*"}, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "take", lambda self, number, table, _take=Selection.take: (
            1 / 0 if number == 2 else _take(self, number, table)))  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            prepared(found)
    log: list[str] = []
    packed = content(prepared(found, log.append))
    assert "a: going on after 2 of 3 pieces" in log
    assert json.loads(packed[shards.QUARANTINE])["place"] == f"{tmp_path}/packed/c.jsonl.gz:51"
    names = [name for name in plain if name not in ("dataset.json", shards.QUARANTINE)]
    assert all(plain[name] == packed[name] for name in names) and len(names) >= 4


def test_killed_at_any_instant_and_started_again_it_is_the_same(tmp_path, many_pieces):
    """Six kills, while reading, selecting and tokenising; the work that was done is not done again."""
    found = config(tmp_path, {"from": write(tmp_path / "a.jsonl", documents(1500))}, "whole")
    whole = content(prepared(found))
    script = """
from data import prepare, sources
from data.preparation import documents
sources.PIECE_BYTES, documents.WORTH_PROCESSES = 5_000, 10**12
import sys; sys.exit(prepare.main(sys.argv[1:]))
"""
    path = tmp_path / "config.yaml"
    found = config(tmp_path, {"from": f"jsonl:{tmp_path}/a.jsonl"}, "killed")
    path.write_text(json.dumps(settings.as_plain(found)))
    command = [sys.executable, "-c", script, "--config", str(path)]
    draw = random.Random(9)
    for place in sorted(draw.sample(range(2, 100), 6)):  # files there are when it happens; some 110 in all
        process = warm.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list((tmp_path / "killed").glob(".work-*/*"))) < place:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert warm.run(*command).returncode == 0
    (made,) = (tmp_path / "killed").glob("a-*")
    assert content(made) == whole
    assert list((tmp_path / "killed").glob(".work-*")) == [] and list((tmp_path / "killed").glob(".tmp-*")) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_piece_that_was_damaged_before_the_next_try_is_read_again(tmp_path, many_pieces, monkeypatch, damage):
    """Whether its rows were selected already or not."""
    source = {"from": write(tmp_path / "a.jsonl", documents(300))}
    expected = content(prepared(config(tmp_path, source, "whole")))
    found = config(tmp_path, source, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "take", lambda self, number, table, _take=Selection.take: (
            1 / 0 if number == 2 else _take(self, number, table)))  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            prepared(found)
    tables = sorted((tmp_path / "shards").glob(".work-*/read-*/rows.arrow"))
    assert len(tables) == 3
    for table in (tables[0], tables[2]):
        data = bytearray(table.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "delete":
            table.unlink()
        else:
            table.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    log: list[str] = []
    assert content(prepared(found, log.append)) == expected
    warnings = [line for line in log if "WARNING" in line and "is read again" in line]
    assert [str(table) in line for table, line in zip((tables[0], tables[2]), warnings, strict=True)] == [True, True]


def test_a_worker_that_is_killed_is_told_and_costs_nothing(tmp_path, many_pieces, monkeypatch):
    source = {"from": write(tmp_path / "a.jsonl", documents(900))}
    expected = content(prepared(config(tmp_path, source, "whole", workers=1)))
    found = config(tmp_path, source, workers=2)
    monkeypatch.setattr(documents_, "_read", _dies)
    with pytest.raises(OSError, match="want of memory") as error:
        prepared(found)
    assert error.value.errno == errno.ENOMEM
    monkeypatch.undo()
    assert content(prepared(found)) == expected


def _dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_malformed_rows_stop_nothing_until_they_are_too_many(tmp_path):
    rows = documents(95) + ["{no"] * 5
    source = {"from": write(tmp_path / "a.jsonl", rows)}
    assert prepared(config(tmp_path, source)).is_dir()
    source = {"from": write(tmp_path / "a.jsonl", rows + ["{no"])}
    message = r"data\.sources\.a: 6 of 101 rows are malformed, more than data\.most_malformed=0\.05 .*a\.jsonl:96: "
    with pytest.raises(SourceError, match=message):
        prepared(config(tmp_path, source))
    assert prepared(config(tmp_path, source, most_malformed=0.1)).is_dir()


def test_planted_duplicates_and_questions_are_dropped_and_counted(tmp_path, real_data):
    def real(name, field, count):
        with open(real_data / name, encoding="utf-8") as file:
            return [json.loads(line)[field] for _, line in zip(range(count), file, strict=False)]

    texts, questions = real("tinystories/train.jsonl", "text", 400), real("gsm8k/test.jsonl", "question", 50)
    draw = random.Random(2)
    near = []
    for text in texts[:40]:
        words = text.split(" ")
        words[draw.randrange(len(words))] = "elephant"
        near.append(" ".join(words))
    held = [f"A riddle.\n{question}\nThe end." for question in questions[:25]]
    swapped = [re.sub(r"\d", lambda _: str(draw.randrange(2, 9)), question) for question in questions[25:]]
    rows = texts + texts[100:130] + near + held + swapped
    source = {"from": write(tmp_path / "a.jsonl", [row if not row.startswith("{") else f" {row}" for row in rows])}
    sets = {"gsm8k": {"from": f"jsonl:{real_data}/gsm8k/test.jsonl", "field": "question"}}
    made = prepared(config(tmp_path, source, near_duplicates=0.8, evaluation_sets=sets))
    about = json.loads((made / "dataset.json").read_text())
    assert about["dropped"] == {"duplicate": 30, "in_evaluation_gsm8k": 50, "near_duplicate": 40}
    assert sum(split["documents"] for split in about["splits"].values()) == 400


def test_filters_are_counted_by_rule(tmp_path):
    rows = documents(50) + ["too short", "@#$%^&* " * 30]
    source = {"from": write(tmp_path / "a.jsonl", rows)}
    made = prepared(config(tmp_path, source, filters={"min_words": 5, "max_symbols": 0.3}))
    assert json.loads((made / "dataset.json").read_text())["dropped"] == {"too_few_words": 2}


def test_inspect_shows_what_is_in_a_folder(tmp_path, capsys):
    texts = documents(40)
    made = prepared(config(tmp_path, {"from": write(tmp_path / "a.jsonl", [*texts, "{no"])}, valid_fraction=0))
    arguments = [str(made), "--tokenizer", str(tmp_path / "tokenizer"), "--first", "38", "--documents", "5"]
    assert inspect.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "40 documents" in shown and "dropped: 1 bad_json" in shown and f"{tmp_path}/a.jsonl:41: " in shown
    assert shown.endswith(f"--- train document 38\n{texts[38]}\n\n--- train document 39\n{texts[39]}\n")
    assert inspect.main([str(made)]) == 1  # no tokenizer lies beside the shards
    assert "name it with --tokenizer" in capsys.readouterr().err
    (made / "train-00000.tokens").write_bytes(b"")
    assert inspect.main(arguments) == 1 and "train-00000.tokens" in capsys.readouterr().err


def test_publish_uploads_what_verifies_with_its_card(tmp_path, capsys, monkeypatch, run):
    """The Hub is a stand-in that notes what it is given."""
    import huggingface_hub

    given = []

    class Hub:
        def create_repo(self, name, **options):
            given.append(("create", name, options["private"]))
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path, path_in_repo=None, **_):
            assert not folder.verify(folder_path)
            text = (folder_path / shards.DESCRIPTION).read_text()
            given.append(("folder", sorted(path.name for path in folder_path.iterdir()), text, path_in_repo))

        def upload_file(self, repo_id, path_or_fileobj, path_in_repo, **_):
            given.append(("file", path_in_repo, path_or_fileobj.decode()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found = config(tmp_path, {"from": write(tmp_path / "a.jsonl", [*documents(40), "{no"])})
    made = prepared(found)
    assert publish.main([str(made), "me/stories", "--private"]) == 0
    (_, name, private), (_, uploaded, described, _), (_, card_name, card) = given
    assert (name, private, card_name) == ("me/stories", True, "README.md")
    assert set(uploaded) == {path.name for path in made.iterdir()} - {shards.QUARANTINE}
    assert str(tmp_path) not in described and json.loads(described)["source"] == "local jsonl files"
    assert str(tmp_path) in (made / shards.DESCRIPTION).read_text() and (made / shards.QUARANTINE).exists()
    assert not list(made.parent.glob(".*public*"))
    assert "- 1 bad_json" in card and str(tmp_path) not in card and "| train |" in card
    dry = [str(made), "me/stories", "--dry-run"]
    assert publish.main(dry) == 0 and card in capsys.readouterr().out
    command = f'"{sys.executable}" -m data.publish "$@" | true; echo ${{PIPESTATUS[0]}}'
    done = run("bash", "-c", command, "-", *dry)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert len(given) == 3
    (made / "train-00000.tokens").write_bytes(b"")
    assert publish.main([str(made), "me/stories"]) == 1 and "must be whole" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        publish.main([str(made), "no-owner"])


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"text": "no question"}], "no field 'question'"),
        ([], "is empty"),
        ([{"question": "Why?"}, {"question": " "}], "1 of 2 are blank"),
    ],
)
def test_an_evaluation_set_without_questions_is_an_error(tmp_path, rows, why):
    """Else nothing would be looked for, and the corpus be called clean."""
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"math": {"from": f"jsonl:{tmp_path}/test.jsonl", "field": "question"}}
    found = config(tmp_path, {"from": write(tmp_path / "a.jsonl", documents(20))}, evaluation_sets=sets)
    with pytest.raises(SourceError, match=f"data.evaluation_sets.math: every row must hold a question .*{why}"):
        prepared(found)


def test_what_is_downloaded_stays_whatever_is_wrong_with_it(tmp_path, monkeypatch):
    """The network may come back, and the limit of malformed rows may be raised; only what was made of it goes."""

    def downloaded(source, field, split, count, work, log):
        (work / "hub-train").mkdir(exist_ok=True)
        (work / "hub-train" / "part-00000.jsonl").write_text("{no\n" * 40)
        if state == "offline":
            raise SourceError("hub:a/b cannot be reached")
        return f"jsonl:{work}/hub-train/*.jsonl"

    monkeypatch.setattr(documents_, "downloaded", downloaded)
    found = config(tmp_path, {"from": "hub:owner/name"})
    for state, why in (("offline", "cannot be reached"), ("there", "40 of 40 rows are malformed|no training doc")):  # noqa: B007
        with pytest.raises(SourceError, match=why):
            prepared(found)
        (work,) = (tmp_path / "shards").glob(".work-*")
        assert [path.name for path in work.iterdir()] == ["hub-train"] or state == "offline"
        assert (work / "hub-train" / "part-00000.jsonl").exists()


def test_a_malformed_row_of_the_hub_is_known_by_its_number_in_the_data_set(tmp_path, monkeypatch):
    """Not by a file that is gone when the shards are there."""

    class Rows(list):
        def state_dict(self):
            return None

    rows = [{"text": text} for text in documents(400)]
    rows[7], rows[350] = {"text": 5}, {"text": None}
    monkeypatch.setattr(download, "PART_BYTES", 5_000)
    monkeypatch.setattr(sources, "open_hub", lambda *_: Rows(rows))
    made = prepared(config(tmp_path, {"from": "hub:owner/name"}))
    found = [json.loads(line) for line in (made / shards.QUARANTINE).read_text().splitlines()]
    assert [(row["reason"], row["place"]) for row in found] == [
        ("not_text", "hub:owner/name:8"), ("missing_field", "hub:owner/name:351")
    ]  # fmt: skip


@pytest.mark.parametrize("moment", ["opened", "written"])
def test_a_full_disk_keeps_the_selection(tmp_path, monkeypatch, moment):
    """SQLite's word for it is not taken for a torn file, and the next try goes on."""
    import sqlite3

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    found = config(tmp_path, {"from": write(tmp_path / "a.jsonl", documents(60))})
    with monkeypatch.context() as patch:
        patch.setattr(prepare.write_tokens, "write_tokens", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(found)
    (database,) = (tmp_path / "shards").glob(".work-*/selection.sqlite")
    if moment == "written":
        database.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "_open" if moment == "opened" else "_side", full)
        with pytest.raises(OSError, match="disk is full.*selection.sqlite") as error:
            prepared(found)
    assert error.value.errno == errno.ENOSPC and database.exists()
    log: list[str] = []
    prepared(found, log.append)
    assert not [line for line in log if "WARNING" in line]


def test_a_corpus_that_has_moved_gives_the_same_data(tmp_path):
    """Its shards name another place, and are the same documents to a run that goes on."""
    (tmp_path / "elsewhere").mkdir()
    first = config(tmp_path, {"from": write(tmp_path / "a.jsonl", documents(40))}, "one")
    moved = config(tmp_path, {"from": write(tmp_path / "elsewhere" / "a.jsonl", documents(40))}, "two")
    other = config(tmp_path, {"from": write(tmp_path / "b.jsonl", documents(41))}, "three")
    paths = [prepared(found) for found in (first, moved, other)]
    assert content(paths[0]) != content(paths[1])
    sums = [shards.digest(path) for path in paths]
    assert sums[0] == sums[1] != sums[2]
