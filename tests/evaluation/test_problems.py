"""Word problems from rows: whole or refused, the held-out side that training never saw, and what was asked before."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

import checkpoints
from checkpoints import text_start
from data import conversations
from data.preparation import clean
from data.sources import SourceError
from evaluation import problems, record
from tokenizer import Tokenizer


def test_reads_every_row_of_json_lines_parquet_and_hub_folders(word_problems, tmp_path):
    path = word_problems(9)
    found = problems.read(f"jsonl:{path}")
    assert [problem.id for problem in found] == [str(number) for number in range(9)]
    assert [problem.gold for problem in found] == [n + n % 7 for n in range(9)]
    rows = [{"question": problem.question, "answer": problem.answer} for problem in found]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    assert problems.read(f"parquet:{tmp_path / 'rows.parquet'}") == found
    (tmp_path / "hub").mkdir()
    for name, part in (("train", rows[:5]), ("test", rows[5:])):
        (tmp_path / "hub" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert [problem.answer for problem in problems.read(f"hub:{tmp_path / 'hub'}", "test")] == [
        row["answer"] for row in rows[5:]
    ]


def test_a_data_set_without_a_test_split_says_so(word_problems, tmp_path):
    (tmp_path / "hub").mkdir()
    word_problems(3).rename(tmp_path / "hub" / "train.jsonl")
    with pytest.raises(SourceError, match="has no split test"):
        problems.read(f"hub:{tmp_path / 'hub'}", "test")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [({"question": "How many?"}, "no field 'answer'"), ({"question": "How many?", "answer": 7}, "not text"),
     ({"question": " ", "answer": "7"}, "row 2: its question is empty"),
     ({"question": "How many?", "answer": "seven"}, "row 2: an answer ends with"), ("text", "a row is an object")],
)  # fmt: skip
def test_a_row_that_is_no_problem_is_named(tmp_path, row, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in ({"question": "Two?", "answer": "2"}, row)))
    with pytest.raises(SourceError, match=complaint):
        problems.read(f"jsonl:{path}")


def test_sources_without_problems_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(SourceError, match="has no problems"):
        problems.read(f"jsonl:{tmp_path / 'a.jsonl'}")
    with pytest.raises(SourceError, match="jsonl, parquet, hub"):
        problems.read("embedded:problems")


def test_the_held_out_side_is_that_of_training(real_data):
    """A problem and every answer to it, as a conversation, lie on one side; white space around it changes nothing."""
    found = problems.read(f"jsonl:{real_data / 'gsm8k' / 'train.jsonl'}")
    assert len(found) == 7473
    held_out = problems.on_side(found, "valid", 0.05)
    assert 300 < len(held_out) < 450
    assert len(held_out) + len(problems.on_side(found, "train", 0.05)) == 7473
    assert set(held_out) < set(problems.on_side(found, "valid", 0.1))
    for problem in found[:500]:
        text = conversations.of_row({"prompt": f" {problem.question}\r\n", "completion": "It is 7.\n#### 7"})
        assert clean.split_of(conversations.question_of(text), 0.05) == problems.side(problem.question, 0.05)
    assert "<<" in found[0].answer and "<<" not in problems.solution(found[0])
    assert problems.solution(found[0]).endswith("#### 72")


def test_the_share_held_out_is_the_runs_own(make_run, tmp_path):
    assert problems.valid_fraction_of(checkpoints.locate(make_run("its-own", valid_fraction=0.3))) == 0.3
    assert problems.valid_fraction_of(checkpoints.locate(make_run("default"))) == 0.05
    assert problems.valid_fraction_of(tmp_path) == 0.05


def test_a_text_starts_as_the_model_was_trained(make_run, tmp_path):
    run = make_run("start")
    tokenizer = Tokenizer.load(checkpoints.tokenizer_of(checkpoints.locate(run)))
    assert text_start(run, tokenizer) == text_start(checkpoints.locate(run), tokenizer) == [tokenizer.end_of_text]
    (tmp_path / "config.json").write_text("{}")
    assert text_start(tmp_path, tokenizer) == [tokenizer.end_of_text]  # a stock folder of ours, as it declares
    tokenizer.declares_begin = False
    assert text_start(tmp_path, tokenizer) == [] and text_start(run, tokenizer) == [tokenizer.end_of_text]


def test_what_was_asked_before_belongs_to_the_weights(make_run, tmp_path):
    path = checkpoints.locate(make_run("recorded"))
    record.add(path, {"evaluation": "gsm8k", "digest": "a"})
    record.add(path, {"evaluation": "gsm8k", "digest": "b"})
    with open(record.file_of(path), "a") as file:
        file.write('{"evaluation": "gsm8k", "dig')  # of a machine that went away
    assert record.file_of(path) == path.parent.parent / "evaluations.jsonl"
    (entry,) = record.earlier(path, {"digest": "a"})
    assert entry["checkpoint"] == path.name and entry["weights"] == record.identity(path)
    assert record.earlier(path, {"digest": "c"}) == []
    other = checkpoints.locate(make_run("recorded-too", seed=1))
    record.file_of(path).rename(record.file_of(other))
    assert record.earlier(other, {"digest": "a"}) == []
    assert checkpoints.locate(path) == path  # a checkpoint is still whole
    alone = tmp_path / "step"
    path.rename(alone)
    record.add(alone, {"digest": "a"})
    assert checkpoints.locate(alone) == alone and record.earlier(alone, {"digest": "a"})
