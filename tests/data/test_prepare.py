"""The shards hold what was in the sources, less what is counted as dropped; a second run does nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import settings
from data import embedded, prepare, sources
from data.preparation import clean, read_pieces
from storage import folder
from tests import warm
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
NOUNS = ("dog", "cat", "ball", "tree", "river", "house", "song", "boat", "hill", "star", "frog", "cake")


def stories(count, first=0):
    """`count` different short documents."""
    return [
        f"Story {n}: the {NOUNS[n % 12]} saw a {NOUNS[n // 12 % 12]} and was glad." for n in range(first, first + count)
    ]


HELD_OUT = next(text for text in stories(50) if clean.split_of(text, 0.5) == "valid")


def write_jsonl(path, rows):
    """Dicts become JSON, strings stay the lines that they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return f"jsonl:{path}"


def write_texts(path, texts):
    return write_jsonl(path, [{"text": text} for text in texts])


def config(tmp_path, sources_, tokenizer=None, **data):
    raw = {"data": {"shards": str(tmp_path / "shards"), "sources": sources_, "most_malformed": 1, **data}}
    raw["tokenizer"] = {"vocab_size": 1024} if tokenizer is None else {"path": str(tokenizer)}
    return settings.validate(prepare.Config, raw)


def prepared(config_, **options):
    """(Prepared, lines logged)"""
    log = []
    return prepare.prepare(config_.data, config_.tokenizer, log.append, **options), log


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(stories(200), 1024).save(path)
    return path


def documents_in(result, name, split):
    """Texts of a split, decoded from the raw files as the format says, and checked against dataset.json."""
    path, description = result.sources[name], result.describe(name)
    counts = description["splits"][split]
    texts, tokens_in_all = [], 0
    for stem in counts["shards"]:
        tokens = numpy.fromfile(path / f"{stem}.tokens", dtype={"uint16": "<u2", "uint32": "<u4"}[description["dtype"]])
        lengths = numpy.fromfile(path / f"{stem}.lengths", dtype="<i8")
        assert lengths.sum() == len(tokens)
        tokens_in_all += len(tokens)
        for document in numpy.split(tokens, lengths.cumsum()[:-1]):
            assert document[-1] == description["end_of_text"]
            assert description["end_of_text"] not in document[:-1]
            texts.append(result.tokenizer.decode(document[:-1].tolist()))
    assert counts["documents"] == len(texts)
    assert counts["tokens"] == tokens_in_all
    assert counts["characters"] == sum(map(len, texts))
    assert counts["bytes"] == sum(len(text.encode()) for text in texts)
    return texts


def left_in(root):
    """What a failed preparation left behind, the lock file aside."""
    return [path.name for path in root.iterdir() if path.name != ".lock"] if root.exists() else []


def state_of(root):
    """Everything about the files that a run which does nothing must leave alone."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def test_the_shards_hold_every_document_once_on_the_side_of_its_hash(tmp_path, small_tokenizer):
    texts = [*stories(300), "Ünïcode 😀 and\ta tab\nand <|endoftext|> spelled out"]
    source = write_texts(tmp_path / "a.jsonl", texts)
    result, _ = prepared(config(tmp_path, {"a": {"from": source}}, small_tokenizer, valid_fraction=0.1))
    for side in ("train", "valid"):
        expected = [text for text in texts if clean.split_of(text, 0.1) == side]
        assert documents_in(result, "a", side) == expected != []
    description = result.describe("a")
    assert description["name"] == "a"
    assert description["source"] == source
    assert description["dtype"] == "uint16"
    assert description["tokenizer_fingerprint"] == result.tokenizer.fingerprint
    assert description["vocab_size"] == result.tokenizer.vocab_size
    assert description["dropped"] == {}
    assert folder.verify(result.sources["a"]) == []


def test_what_is_dropped_is_counted_by_reason_and_logged_once(tmp_path, small_tokenizer):
    good = stories(40)
    rows = [{"text": text} for text in good]
    rows[3:3] = ["{nonsense", {"text": "x"}, {"text": " \r\n "}, {"title": "none"}, {"text": 5}, "{more nonsense"]
    rows += [{"text": good[0] + "  \r\n"}, {"text": good[1]}, {"text": "e\u0301tude number one"}]
    rows += [{"text": "\u00e9tude number one"}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    result, log = prepared(
        config(tmp_path, {"a": {"from": source}}, small_tokenizer, valid_fraction=0, min_characters=2)
    )
    dropped = {"bad_json": 2, "duplicate": 3, "missing_field": 1, "not_text": 1, "too_short": 2}
    assert result.describe("a")["dropped"] == dropped
    assert documents_in(result, "a", "train") == [*good, "\u00e9tude number one"]
    about = [line for line in log if "bad_json" in line]
    assert len(about) == 1 and f"dropped 2 bad_json, the first at {tmp_path}/a.jsonl:4: " in about[0]
    assert any("no validation documents" in line for line in log)


def test_own_validation_documents_are_kept_out_of_training(tmp_path, small_tokenizer):
    train, valid = stories(50), [*stories(10, first=45), "a validation story of its own"]
    config_ = config(
        tmp_path,
        {
            "a": {
                "from": write_texts(tmp_path / "a.jsonl", [*train, train[49] + "\r\n"]),
                "valid_from": write_texts(tmp_path / "b.jsonl", [*valid, valid[0]]),
            }
        },
        small_tokenizer,
    )
    result, _ = prepared(config_)
    assert documents_in(result, "a", "train") == train[:45]
    assert documents_in(result, "a", "valid") == valid
    assert result.describe("a")["dropped"] == {"duplicate": 1, "in_validation": 6}


def test_embedded_sources_bring_their_own_validation(tmp_path, small_tokenizer):
    config_ = config(tmp_path, {"s": {"from": "embedded:stories", "documents": 120}}, small_tokenizer, seed=7)
    result, _ = prepared(config_)
    assert documents_in(result, "s", "train") == list(embedded.documents("stories", "train", 120, 7))
    assert documents_in(result, "s", "valid") == list(embedded.documents("stories", "valid", 100, 7))


def test_at_most_so_many_documents_are_read(tmp_path, small_tokenizer):
    source = write_texts(tmp_path / "a.jsonl", stories(50))
    config_ = config(tmp_path, {"a": {"from": source, "documents": 20}}, small_tokenizer, valid_fraction=0)
    assert documents_in(prepared(config_)[0], "a", "train") == stories(20)


def test_parts_of_a_corpus_are_disjoint_and_together_the_whole(tmp_path, small_tokenizer):
    source = write_texts(tmp_path / "a.jsonl", stories(300))
    parts = {f"p{n}": {"from": source, "part": f"{n}/3"} for n in (1, 2, 3)}
    result, _ = prepared(config(tmp_path, {**parts, "whole": {"from": source}}, small_tokenizer, valid_fraction=0.1))
    for split in ("train", "valid"):
        texts = {name: documents_in(result, name, split) for name in result.sources}
        together = texts["p1"] + texts["p2"] + texts["p3"]
        assert sorted(together) == sorted(texts["whole"]) and len(set(together)) == len(together)
    sizes = [len(documents_in(result, name, "train")) for name in parts]
    assert min(sizes) > 60
    dropped = result.describe("p1")["dropped"]["other_part"]
    assert dropped == 300 - sum(len(documents_in(result, "p1", split)) for split in ("train", "valid"))


def test_a_hub_folder_is_prepared_with_its_own_validation_split(tmp_path, small_tokenizer):
    (tmp_path / "set").mkdir()
    write_texts(tmp_path / "set" / "train.jsonl", stories(30))
    write_texts(tmp_path / "set" / "validation.jsonl", stories(5, first=28))
    source = f"hub:{tmp_path}/set"
    result, _ = prepared(config(tmp_path, {"a": {"from": source, "valid_from": source}}, small_tokenizer))
    assert documents_in(result, "a", "train") == stories(28)
    assert documents_in(result, "a", "valid") == stories(5, first=28)


def test_shards_are_cut_at_the_limit_and_never_within_a_document(tmp_path, small_tokenizer):
    texts = [*stories(60), " ".join(stories(30)), *stories(60, first=60)]
    config_ = config(
        tmp_path, {"a": {"from": write_texts(tmp_path / "a.jsonl", texts)}}, small_tokenizer, valid_fraction=0
    )
    result, _ = prepared(config_, shard_tokens=300)
    assert documents_in(result, "a", "train") == texts
    stems = result.describe("a")["splits"]["train"]["shards"]
    assert stems == [f"train-{number:05d}" for number in range(len(stems))]
    sizes = [(result.sources["a"] / f"{stem}.tokens").stat().st_size // 2 for stem in stems]
    assert len(sizes) > 5
    assert sum(size > 300 for size in sizes) == 1  # the one document that is longer


def test_batches_for_the_tokenizer_are_bounded(tmp_path, monkeypatch, small_tokenizer):
    monkeypatch.setattr(read_pieces, "BATCH_ROWS", 7)
    monkeypatch.setattr(read_pieces, "BATCH_CHARACTERS", 200)
    texts = stories(50)
    sizes = []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, batch: sizes.append(len(batch)) or encode_batch(self, batch)
    )
    config_ = config(
        tmp_path, {"a": {"from": write_texts(tmp_path / "a.jsonl", texts)}}, small_tokenizer, valid_fraction=0
    )
    assert documents_in(prepared(config_)[0], "a", "train") == texts
    assert sum(sizes) == 50 and max(sizes) <= 7 and len(sizes) > 8


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path, small_tokenizer, monkeypatch):
    config_ = config(
        tmp_path, {"a": {"from": write_texts(tmp_path / "a.jsonl", stories(9))}}, small_tokenizer, valid_fraction=0
    )
    tokenizer = Tokenizer.load(small_tokenizer)
    tokenizer.vocab_size = 65_537
    tokenizer.encode_batch = lambda texts: [[65_536, 1] for _ in texts]
    monkeypatch.setattr(Tokenizer, "load", lambda _: tokenizer)
    result, _ = prepared(config_)
    assert result.describe("a")["dtype"] == "uint32"
    stored = numpy.fromfile(result.sources["a"] / "train-00000.tokens", dtype="<u4")
    assert stored.tolist() == [65_536, 1, tokenizer.end_of_text] * 9


def test_an_id_that_does_not_fit_stops_preparation_and_leaves_nothing(tmp_path, small_tokenizer, monkeypatch):
    config_ = config(tmp_path, {"a": {"from": write_texts(tmp_path / "a.jsonl", stories(9))}}, small_tokenizer)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[65_536] for _ in texts])
    with pytest.raises(OverflowError):
        prepared(config_)
    assert left_in(tmp_path / "shards") == []


def test_a_second_run_does_nothing(tmp_path):
    sources_ = {
        "a": {"from": write_texts(tmp_path / "a.jsonl", stories(200))},
        "s": {"from": "embedded:problems", "documents": 50},
    }
    first, log = prepared(config(tmp_path, sources_))
    assert not any("already prepared" in line for line in log)
    before = state_of(tmp_path / "shards")
    second, log = prepared(config(tmp_path, sources_))
    assert state_of(tmp_path / "shards") == before
    assert len(log) == 3 and all("already prepared" in line for line in log)
    assert second.sources == first.sources
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_preparations_of_one_folder_at_once_wait_for_each_other(tmp_path):
    """Several processes are started together on the same sources: one makes the shards, the others find them."""
    write_config(tmp_path, write_texts(tmp_path / "a.jsonl", stories(3000)))
    command = [sys.executable, "-m", "data.prepare", "--config", str(tmp_path / "config.yaml"), "--json"]
    started = [
        warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * 4, outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    made = [line for _, log in outputs for line in log.splitlines() if "preparing" in line or "training up to" in line]
    assert len(made) == 2, made  # the tokenizer once, the source once
    assert not [path for path in (tmp_path / "shards").iterdir() if "tmp" in path.name or "broken" in path.name]


def test_the_same_config_gives_the_same_bytes_anywhere(tmp_path):
    results = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        sources_ = {
            "a": {"from": write_texts(tmp_path / place / "a.jsonl", stories(300))},
            "r": {"from": "embedded:recall", "documents": 3},
        }
        results.append(prepared(config(tmp_path / place, sources_))[0])
    one, two = results
    assert one.tokenizer.fingerprint == two.tokenizer.fingerprint
    for name in ("a", "r"):
        assert one.sources[name].name == two.sources[name].name
        for path in one.sources[name].glob("*-*.*"):
            assert path.read_bytes() == (two.sources[name] / path.name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"sources": {"a": {"field": "body"}}},
        {"sources": {"a": {"documents": 100}}},
        {"sources": {"a": {"valid_from": "b"}}},
        {"valid_fraction": 0.3},
        {"min_characters": 44},
        {"tokenizer": "other"},
        {"content": "other"},
        {"code": "other"},
    ],
    ids=str,
)
def test_whatever_changes_the_content_makes_a_new_folder(tmp_path, small_tokenizer, change, monkeypatch):
    rows = [{"text": text, "body": text[::-1]} for text in stories(200)]
    path = tmp_path / "a.jsonl"
    source = {"from": write_jsonl(path, rows)}
    first, _ = prepared(config(tmp_path, {"a": source}, small_tokenizer))
    data = {"valid_fraction": 0.02, "min_characters": 1}
    tokenizer = small_tokenizer
    match change:
        case {"sources": {"a": keys}}:
            source |= keys
            if "valid_from" in keys:
                source["valid_from"] = write_jsonl(tmp_path / "b.jsonl", rows[:10])
        case {"tokenizer": _}:
            tokenizer = tmp_path / "other"
            Tokenizer.train(stories(200, first=10_000), 1030).save(tokenizer)
        case {"content": _}:  # same size, and the same time too
            times = path.stat()
            path.write_bytes(path.read_bytes().replace(b"glad", b"good"))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        case {"code": version}:
            monkeypatch.setattr(prepare, "CODE_VERSION", version)
        case _:
            data |= change
    second, log = prepared(config(tmp_path, {"a": source}, tokenizer, **data))
    assert second.sources["a"] != first.sources["a"]
    assert folder.verify(first.sources["a"]) == folder.verify(second.sources["a"]) == []


def test_embedded_shards_follow_seed_count_and_version(tmp_path, small_tokenizer, monkeypatch):
    def path(seed=1, documents=10):
        source = {"s": {"from": "embedded:stories", "documents": documents}}
        return prepared(config(tmp_path, source, small_tokenizer, seed=seed))[0].sources["s"]

    paths = [path(), path(seed=2), path(documents=11)]
    monkeypatch.setattr(embedded, "VERSION", embedded.VERSION + 1)
    paths.append(path())
    assert len(set(paths)) == 4


def test_a_moved_corpus_is_still_prepared(tmp_path, small_tokenizer):
    source = write_texts(tmp_path / "a.jsonl", stories(50))
    prepared(config(tmp_path, {"a": {"from": source}}, small_tokenizer))
    shutil.move(tmp_path / "a.jsonl", tmp_path / "moved.jsonl")
    _, log = prepared(config(tmp_path, {"a": {"from": f"jsonl:{tmp_path}/moved.jsonl"}}, small_tokenizer))
    assert len(log) == 1 and "already prepared" in log[0]


@pytest.mark.parametrize("own_tokenizer", [True, False])
@pytest.mark.parametrize("change", ["grown", "gone", "questions"])
def test_a_corpus_that_changes_while_it_is_read_gives_no_shards(
    tmp_path, small_tokenizer, monkeypatch, change, own_tokenizer
):
    """They would be a mixture under the name of what the files were."""
    path, exam = tmp_path / "a.jsonl", tmp_path / "exam.jsonl"
    write_texts(exam, ["How many legs do seven spiders have?"])

    def read(*arguments, _read=read_pieces.read_piece):
        _read(*arguments)
        if change == "gone":
            path.unlink(missing_ok=True)
        else:
            (path if change == "grown" else exam).write_text('{"text": "another text altogether"}\n')

    source = {"a": {"from": write_texts(path, stories(50))}}
    config_ = config(tmp_path, source, None if own_tokenizer else small_tokenizer,
                     evaluation_sets={"legs": {"from": f"jsonl:{exam}"}})  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(sources.BadContentError, match="data.sources.a: its files"):
        patch.setattr(read_pieces, "read_piece", read)
        prepared(config_)
    assert left_in(tmp_path / "shards") == []
    write_texts(path, stories(60))
    assert len(documents_in(prepared(config_)[0], "a", "train")) > 50


@pytest.mark.parametrize("which", ["a", "tokenizer"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_folder_is_set_aside_loudly_and_made_again(tmp_path, which, damage):
    config_ = config(tmp_path, {"a": {"from": write_texts(tmp_path / "a.jsonl", stories(200))}})
    first, _ = prepared(config_)
    good = documents_in(first, "a", "train")
    file = "train-00000.tokens" if which == "a" else "tokenizer.json"
    path = next((tmp_path / "shards").glob(f"{which}-*/{file}"))
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    second, log = prepared(config_)
    warnings = [line for line in log if line.startswith("WARNING") and str(path) in line]
    assert len(warnings) == 1 and "prepared again" in warnings[0]
    assert second.sources == first.sources
    assert folder.verify(path.parent) == []
    assert documents_in(second, "a", "train") == good
    assert len(list((tmp_path / "shards").glob(f".{which}-*.broken-1"))) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.sources.a: there are no training documents in jsonl:.*it is empty"),
        (["{", {"title": "x"}], "1 bad_json, the first at .*a.jsonl:1: .*; dropped 1 missing_field"),
        ([{"text": "\n"}], "dropped 1 too_short"),
        ([{"text": HELD_OUT}], "all 1 are held out for validation: give more, `valid_from`"),
    ],
)
@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_source_without_documents_is_an_error_that_names_it(tmp_path, small_tokenizer, rows, message, own_tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer = None if own_tokenizer else small_tokenizer
    with pytest.raises(sources.SourceError, match=message):
        prepared(config(tmp_path, {"a": {"from": source}}, tokenizer, valid_fraction=0.5))
    assert left_in(tmp_path / "shards") == []


def test_a_validation_source_without_documents_is_an_error(tmp_path, small_tokenizer):
    source = {
        "from": write_texts(tmp_path / "a.jsonl", stories(9)),
        "valid_from": write_texts(tmp_path / "b.jsonl", []),
    }
    with pytest.raises(sources.SourceError, match="data.sources.a: there are no validation documents in .*b.jsonl"):
        prepared(config(tmp_path, {"a": source}, small_tokenizer))


def test_the_own_tokenizer_sees_an_even_sample_of_training_documents_only(tmp_path, monkeypatch):
    seen = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: seen.extend(texts) or train(texts, size))
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 20_000)
    held_out = stories(20, first=10_000)
    sources_ = {
        "big": {"from": write_texts(tmp_path / "big.jsonl", [*stories(2000), *stories(100)])},
        "small": {
            "from": write_texts(tmp_path / "small.jsonl", [*stories(30, first=9_000), *held_out]),
            "valid_from": write_texts(tmp_path / "valid.jsonl", held_out),
        },
        "made": {"from": "embedded:stories", "documents": 500},
    }
    result, _ = prepared(config(tmp_path, sources_))
    assert len(seen) == len(set(seen))
    assert not set(seen) & set(held_out)
    in_big, in_small = set(stories(2000)), set(stories(30, first=9_000))
    in_made = set(embedded.documents("stories", "train", 500, 1234))
    big, made = [text for text in seen if text in in_big], [text for text in seen if text in in_made]
    assert 6000 < sum(map(len, big)) <= 20_000 // 3
    assert {clean.split_of(text, 0.02) for text in big} == {"train"}
    numbers = sorted(int(text.split()[1][:-1]) for text in big)
    assert numbers[0] < 200 and numbers[-1] > 1800  # from all of the file, not from its beginning
    assert in_small <= set(seen)
    assert 20_000 // 3 <= sum(map(len, made)) < 9_000
    assert len(seen) == len(big) + 30 + len(made)
    assert Tokenizer.load(next((tmp_path / "shards").glob("tokenizer-*"))).fingerprint == result.tokenizer.fingerprint


def test_one_huge_document_is_sampled_only_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 5_000)
    (tmp_path / "book.txt").write_text("\n".join(stories(2000)))
    config_ = config(tmp_path, {"a": {"from": f"text:{tmp_path}/book.txt"}}, valid_fraction=0)
    _, log = prepared(config_)
    assert any("on 0.0 MB, 1 documents" in line for line in log)


def test_real_stories(tmp_path, real_data):
    file = real_data / "tinystories" / "valid.jsonl"
    raw = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    config_ = config(tmp_path, {"tiny": {"from": f"jsonl:{file}"}}, valid_fraction=0.1)
    result, log = prepared(config_)
    train, valid = documents_in(result, "tiny", "train"), documents_in(result, "tiny", "valid")
    dropped = result.describe("tiny")["dropped"]
    assert len(train) + len(valid) + sum(dropped.values()) == len(raw) == 1500
    assert set(dropped) <= {"duplicate"}
    assert set(train) | set(valid) == {clean.normalise(text) for text in raw}
    assert not set(train) & set(valid)
    assert 100 < len(valid) < 200
    counts = result.describe("tiny")["splits"]["train"]
    assert 2.5 < counts["bytes"] / (counts["tokens"] - counts["documents"]) < 5


def write_config(tmp_path, source, **data):
    raw = {
        "run": {"name": "ignored"},
        "training": "ignored",
        "data": {"shards": str(tmp_path / "shards"), "sources": {"a": {"from": source}}, **data},
        "tokenizer": {"vocab_size": 1024},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(raw))  # JSON is YAML
    return str(tmp_path / "config.yaml")


def test_the_command_prints_a_table_or_one_object(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [*({"text": text} for text in stories(1500)), "{"])
    path = write_config(tmp_path, source)
    assert prepare.main(["--config", path, "data.valid_fraction=0.1"]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["source", "split", "documents", "tokens", "bytes/token", "dropped"]
    assert table[1].split()[:2] == ["a", "train"] and table[1].endswith("1 bad_json")
    assert prepare.main(["--config", path, "data.valid_fraction=0.1", "--json"]) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert "already prepared" in output.err
    assert summary["tokenizer"]["vocab_size"] <= 1024
    described = summary["sources"]["a"]
    assert described["dropped"] == {"bad_json": 1}
    train = described["splits"]["train"]
    assert table[1].split()[2:5] == [
        f"{train['documents']:,}",
        f"{train['tokens']:,}",
        f"{train['bytes'] / (train['tokens'] - train['documents']):.3f}",
    ]
    assert train["documents"] + described["splits"]["valid"]["documents"] == 1500
    assert folder.verify(described["path"]) == []


def test_the_command_exits_2_with_all_problems_and_1_for_a_source_that_fails(tmp_path, capsys):
    path = write_config(tmp_path, f"jsonl:{tmp_path}/none.jsonl", valid_fraction=-1)
    assert prepare.main(["--config", path, "tokenizer.vocab_size=10", "data.typo=1"]) == 2
    report = capsys.readouterr().err
    for key in ("data.sources.a.from", "data.valid_fraction", "tokenizer.vocab_size", "data.typo"):
        assert f"  {key}: " in report
    assert "4 problems" in report
    assert prepare.main(["--config", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "empty.yaml").write_text("run: {name: x}\n")
    assert prepare.main(["--config", str(tmp_path / "empty.yaml")]) == 2
    assert "data: this key is required" in capsys.readouterr().err
    path = write_config(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["{"]))
    assert prepare.main(["--config", path]) == 1
    assert "not prepared: data.sources.a: there are no training documents" in capsys.readouterr().err
    assert left_in(tmp_path / "shards") == []


@pytest.mark.parametrize("place", [None, "some.file"])
def test_the_command_says_where_the_disk_is_full_and_what_to_do(tmp_path, capsys, monkeypatch, place):
    def full(*_):
        raise OSError(errno.ENOSPC, "Error writing bytes to file", place)

    monkeypatch.setattr(read_pieces, "read_piece", full)
    assert prepare.main(["--config", write_config(tmp_path, write_texts(tmp_path / "a.jsonl", stories(9)))]) == 1
    said = capsys.readouterr().err
    assert "Error writing bytes to file" in said and (place or f"{tmp_path}/shards") in said
    assert "make room or make it writable; the same command goes on from there" in said


def test_help_comes_without_heavy_imports(run):
    code = "import sys, runpy\nsys.argv = ['data.prepare', '--help']\n"
    code += "try: runpy.run_module('data.prepare', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print('HEAVY', [m for m in ('torch', 'datasets', 'pyarrow', 'transformers') if m in sys.modules])"
    done = run(sys.executable, "-c", code)
    assert "section.key=value" in done.stdout
    assert done.stdout.endswith("HEAVY []\n"), done.stderr
