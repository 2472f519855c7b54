"""A source of which no document falls to validation has the end of its last one there, and nowhere else."""

import pytest

from data import inspect, publish, shards, sources
from data.preparation import clean
from data.preparation import documents as documents_
from data.preparation.select_documents import Selection
from storage import folder
from tests.data.test_prepare import (  # noqa: F401
    config,
    documents_in,
    prepared,
    small_tokenizer,
    stories,
    write_jsonl,
    write_texts,
)

ON_TRAIN = [text for text in stories(200) if clean.split_of(text, 0.1) == "train"]
PARAGRAPHS = "\n\n".join("\n".join(stories(3, first)) for first in range(0, 300, 3))


def sides(result, name="a"):
    return documents_in(result, name, "train"), documents_in(result, name, "valid")


def text_file(path, text):
    path.write_text(text, encoding="utf-8")
    return {"from": f"text:{path}"}


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_newcomer_one_text_file_has_validation(tmp_path, small_tokenizer, capsys, own_tokenizer):  # noqa: F811
    source = text_file(tmp_path / "input.txt", PARAGRAPHS + "\n")
    result, log = prepared(config(tmp_path, {"a": source}, None if own_tokenizer else small_tokenizer))
    (train,), (valid,) = sides(result)
    assert f"{train}\n\n{valid}" == PARAGRAPHS
    assert 0.02 <= len(valid) / len(PARAGRAPHS) < 0.03
    assert result.describe("a")["held_out_end"] == {"characters": len(valid), "of": len(PARAGRAPHS)}
    said = f"the end of the last one is held out, {len(valid):,} of its {len(PARAGRAPHS):,} characters"
    assert [said in line for line in log].count(True) == 1 and not any("WARNING" in line for line in log)
    named = [] if own_tokenizer else ["--tokenizer", str(small_tokenizer)]
    assert inspect.main([str(result.sources["a"]), "--split", "valid", *named]) == 0
    shown = capsys.readouterr().out
    assert said in shown and valid.splitlines()[0] in shown
    assert said in publish.card(result.describe("a"), "me/mine", "mit")
    before = (result.sources, result.tokenizer.fingerprint)
    again, log = prepared(config(tmp_path, {"a": source}, None if own_tokenizer else small_tokenizer))
    assert (again.sources, again.tokenizer.fingerprint) == before and all("already" in line for line in log)


def test_newcomer_of_a_few_documents_the_last_gives_its_end_and_other_sources_nothing(tmp_path, small_tokenizer):  # noqa: F811
    few = [" ".join(ON_TRAIN[:5]), "\n".join(ON_TRAIN[5:25]), "too short to be cut"]
    assert {clean.split_of(text, 0.1) for text in few} == {"train"}
    own = {"from": write_texts(tmp_path / "c.jsonl", few), "valid_from": write_texts(tmp_path / "v.jsonl", stories(2))}
    many = write_texts(tmp_path / "b.jsonl", stories(200))
    sources_ = {"few": {"from": write_texts(tmp_path / "a.jsonl", few)}, "many": {"from": many}, "own": own}
    result, _ = prepared(config(tmp_path, sources_, small_tokenizer, valid_fraction=0.1))
    train, (valid,) = sides(result, "few")
    assert [train[0], f"{train[1]}\n{valid}", train[2]] == few
    assert 0.1 < len(valid) / sum(map(len, few)) < 0.2
    for name, texts in (("many", stories(200)), ("own", few)):
        assert "held_out_end" not in result.describe(name)
        train, valid = sides(result, name)
        assert train == [text for text in texts if text not in valid] and valid


def test_what_has_validation_documents_gives_the_tokens_that_it_gave(tmp_path, small_tokenizer):  # noqa: F811
    """So that runs go on with them: the digest is that of the version that knew no end."""
    result, _ = prepared(config(tmp_path, {"a": {"from": write_texts(tmp_path / "a.jsonl", stories(300))}},
                                small_tokenizer, valid_fraction=0.1))  # fmt: skip
    assert shards.digest(result.sources["a"]) == "09acb3ecb8b0b82f7c5338316bc0498ba00b6545b61077bb5833faac934edc82"


def test_newcomer_a_single_document_that_falls_to_validation_is_cut_as_well(tmp_path, small_tokenizer):  # noqa: F811
    text = next(text for n in range(50) if clean.split_of(text := "\n".join(stories(9, n)), 0.5) == "valid")
    result, _ = prepared(config(tmp_path, {"a": text_file(tmp_path / "a.txt", text)}, small_tokenizer,
                                valid_fraction=0.5))  # fmt: skip
    (train,), (valid,) = sides(result)
    assert f"{train}\n{valid}" == text and len(valid) > len(text) / 2


@pytest.mark.parametrize("near_duplicates", [None, 0.8])
def test_newcomer_what_equals_the_end_is_not_trained(tmp_path, small_tokenizer, near_duplicates):  # noqa: F811
    for first in range(80):  # of which none falls to validation by its hash
        end = " ".join(ON_TRAIN[first + 50 : first + 58])
        nearly = f"{end} The end."
        texts = [ON_TRAIN[0], end, nearly, "\n".join(ON_TRAIN[1:30]) + "\n" + end]
        if {clean.split_of(text, 0.15) for text in texts} == {"train"}:
            break
    texts = texts if near_duplicates is None else [texts[0], nearly, texts[3]]
    source = {"from": write_texts(tmp_path / "a.jsonl", texts)}
    result, _ = prepared(config(tmp_path, {"a": source}, small_tokenizer, valid_fraction=0.15,
                                near_duplicates=near_duplicates))  # fmt: skip
    train, valid = sides(result)
    assert valid == [end]
    assert train == [texts[0], *([nearly] if near_duplicates is None else []), "\n".join(ON_TRAIN[1:30])]
    assert result.describe("a")["dropped"] == {"in_validation": 1}


TALK = {"question": "What did the dog see? " + ON_TRAIN[0], "answer": "\n".join(ON_TRAIN[1:9])}


@pytest.mark.parametrize(
    ("rows", "keys", "fraction", "said"),
    [
        ([{"text": "Hello world."}], {}, 0.02, "all are too short for an end to be held out"),
        ([{"text": PARAGRAPHS}], {}, 0, "no validation documents: give it"),
        ([TALK], {"conversations": True}, 0.02, "conversations are not cut"),
    ],
)
def test_newcomer_where_nothing_can_be_held_out_one_line_says_so(tmp_path, small_tokenizer, rows, keys, fraction, said):  # noqa: F811
    source = {"from": write_jsonl(tmp_path / "a.jsonl", rows), **keys}
    result, log = prepared(config(tmp_path, {"a": source}, small_tokenizer, valid_fraction=fraction))
    assert [line for line in log if "validation" in line] == [line for line in log if said in line] != []
    assert [counts["documents"] for counts in result.describe("a")["splits"].values()] == [1, 0]


def test_the_end_is_the_same_in_pieces_and_after_an_interruption(tmp_path, small_tokenizer, monkeypatch):  # noqa: F811
    few = ["\n".join(stories(60, first)) for first in range(0, 300, 60)]
    assert {clean.split_of(text, 0.02) for text in few} == {"train"}
    source = {"from": write_texts(tmp_path / "a.jsonl", few)}
    one, _ = prepared(config(tmp_path, {"a": source}, small_tokenizer, workers=1))
    monkeypatch.setattr(sources, "PIECE_BYTES", 3000)
    found = config(tmp_path, {"a": source}, small_tokenizer, shards=str(tmp_path / "pieces"), workers=2)
    for moment in ("hold_out_end", "_count_dropped", "cut"):  # before it is cut, while, and after

        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if moment == "_count_dropped":  # that of the end: no piece is taken again
                patch.setattr(Selection, "_take", None)
            patch.setattr(Selection, moment, stop)
            prepared(found)
    monkeypatch.setattr(documents_, "WORTH_PROCESSES", 0)  # the tokens are written by two
    many, _ = prepared(found)
    for path in one.sources["a"].iterdir():
        if path.name != folder.MANIFEST:
            assert path.read_bytes() == (many.sources["a"] / path.name).read_bytes()


@pytest.mark.parametrize(
    ("text", "characters", "end"),
    [
        ("a" * 100 + "\n\n" + "b" * 30 + "\n" + "c" * 40, 40, "b" * 30 + "\n" + "c" * 40),  # a paragraph before a line
        ("a" * 100 + "\n" + "b " * 20 + "c" * 20, 40, "b " * 20 + "c" * 20),  # a line before a word
        ("a" * 100 + "\n \n\n  " + "c" * 50, 40, "  " + "c" * 50),  # with its indent
        ("a" * 100 + " " + "b" * 50, 40, "b" * 50),
        ("a" * 100, 40, "a" * 40),
        ("\u0915\u093e" * 50, 41, "\u0915\u093e" * 21),  # no mark without its letter
        ("a" * 100, 3, "a" * clean.LEAST),
        ("a" * 100, 10**9, "a" * 50),  # never more than half
        ("\n" * 500 + "a" * 100, 60, "a" * 50),
        ("a" * (2 * clean.LEAST), 1, "a" * clean.LEAST),
    ],
)
def test_where_a_document_is_cut(text, characters, end):
    place = clean.place_of_cut(text, characters)
    head, tail = clean.cut_at(text, place)
    assert tail == end and (head + tail).replace("\n", "") == text.replace("\n", "").replace(f" {tail}", tail)
    assert all(clean.normalise(part) == part for part in (head, tail))


@pytest.mark.parametrize("text", ["", "a", " \n" * 90 + "a" * 63, "a" * 63])
def test_what_is_too_short_is_not_cut(text):
    assert clean.place_of_cut(text, 10) is None
