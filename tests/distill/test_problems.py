"""Which problems a teacher is given: the same whatever the files are called and however their rows lie, and never those
of an exam or of the `dev` part."""

import json
import random

import pytest

from data import sources
from data.preparation import clean
from distill import problems, traces
from distill.prompts import Prompts
from distill.settings import ProblemsSection, PromptSection
from evaluation.answers import extract_answer
from settings import ConfigError


def _write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _section(path, **changes):
    return ProblemsSection(**{"from": f"jsonl:{path}", "valid_fraction": 0, **changes})


def test_order_and_file_names_do_not_matter(tmp_path, rows):
    one = problems.read(_section(_write(tmp_path / "one.jsonl", rows)))
    shuffled = random.Random(1).sample(rows, len(rows))
    _write(tmp_path / "b-1.jsonl", shuffled[:20])
    _write(tmp_path / "b-2.jsonl", shuffled[20:])
    parts = problems.read(_section(tmp_path / "b-*.jsonl"))
    assert parts == one and parts.digest == one.digest and len(one.problems) == len(rows)
    assert {problem.question: problem.answer for problem in one.problems} == {
        row["question"]: str(extract_answer(row["answer"])) for row in rows
    }
    few = problems.read(_section(tmp_path / "b-*.jsonl", count=10))
    assert few.problems == one.problems[:10] and few.left_out == {"over_count": 50}


def test_the_digest_covers_questions_and_answers(tmp_path, rows):
    digest = problems.read(_section(_write(tmp_path / "a.jsonl", rows))).digest
    other_answer = [{**rows[0], "answer": "#### 77"}, *rows[1:]]
    other_question = [{**rows[0], "question": rows[0]["question"] + " Say it."}, *rows[1:]]
    for changed in (other_answer, other_question, rows[1:]):
        assert problems.read(_section(_write(tmp_path / "b.jsonl", changed))).digest != digest


def test_rows_that_are_no_problems_are_counted_and_told(tmp_path, rows):
    bad = ["{torn", {"answer": "#### 1"}, {"question": "  ", "answer": "#### 1"}, {"question": 7, "answer": "#### 1"}]
    said = []
    twice = {**rows[0], "answer": "It is\n#### 99"}
    path = _write(tmp_path / "a.jsonl", [*rows[:5], *bad, twice, {"question": "Why is that so?", "answer": "Because."}])
    found = problems.read(_section(path), said.append)
    assert found.left_out == {"bad_json": 1, "missing_field": 1, "empty": 1, "not_text": 1, "duplicate": 1}
    assert len(found.problems) == 6
    assert "3 rows" in said[0] and f"{path}:6" in said[0] and "1 of 6 answers" in said[1]
    other_way = problems.read(_section(_write(tmp_path / "b.jsonl", [twice, *rows[:5]])))
    first = next(problem for problem in other_way.problems if problem.question == rows[0]["question"])
    assert first in found.problems  # of two answers to one question the same one stays, whichever comes first


@pytest.mark.parametrize(("text", "number"), [("1 + 1 = 2\n#### 2", "2"), ("1,234", "1234"), (" $0.5 ", "1/2"),
                                              ("two", None), ("It is 5", None), ("5 pens", None)])  # fmt: skip
def test_the_number_of_an_answer(text, number):
    found = problems.number_of(text)
    assert (None if found is None else str(found)) == number


def test_the_dev_part_is_the_validation_side_of_the_questions_hash(tmp_path, rows):
    path = _write(tmp_path / "a.jsonl", rows)
    found = problems.read(_section(path, valid_fraction=0.3))
    asked = {problem.question for problem in found.problems}
    for row in rows:
        is_dev = clean.split_of(clean.normalise(row["question"]).strip(), 0.3) == "valid"
        assert (row["question"] in asked) != is_dev
    assert found.left_out["dev"] == len(rows) - len(asked) > 5
    assert len(problems.read(_section(path, valid_fraction=0.3, evaluation_only=True)).problems) == len(rows)


def test_questions_of_an_exam_are_left_out_and_a_whole_exam_is_refused(tmp_path, rows):
    question = "A farmer sells 12 eggs a day at 3 dollars each. What does he earn?"
    exam = _write(tmp_path / "exam.jsonl", [{"q": question}])
    asked = {"question": "A farmer sells 15 eggs a day at 4 dollars each. What does he earn?", "answer": "#### 60"}
    sets = {"eggs": {"from": f"jsonl:{exam}", "field": "q"}}
    path = _write(tmp_path / "a.jsonl", [*rows, asked])
    found = problems.read(_section(path, evaluation_sets=sets))
    assert found.left_out == {"in_evaluation_eggs": 1} and len(found.problems) == len(rows)
    with pytest.raises(sources.SourceError, match="evaluation_only=true"):
        problems.read(_section(_write(tmp_path / "b.jsonl", [asked]), evaluation_sets=sets))
    marked = _section(tmp_path / "b.jsonl", evaluation_sets=sets, evaluation_only=True)
    assert len(problems.read(marked).problems) == 1


def test_what_a_teacher_wrote_is_a_source_of_problems(tmp_path):
    good = "Mia has 4 hens that lay 3 eggs a day each. How many eggs are there in a week?"
    texts = {good: "stop", good + " ": "stop", good[:-1]: "stop", "How many?": "stop", good + " How?": "stop",
             good + "\n#### 84": "stop", "Tom has 5 pens and buys 6. How many has he got?": "length"}  # fmt: skip
    rows = [{"id": "x", "sample": number, "seed": number, "question": "q", "answer": None, "text": text,
             "finish": finish, "prompt_tokens": 1, "tokens": 1}
            for number, (text, finish) in enumerate(texts.items())]  # fmt: skip
    job = {"fingerprint": "f", "chunks": 1, "content": {"prompt": {"task": "write"}, "teacher": {}}}
    (tmp_path / traces.JOB).write_text(json.dumps(job))
    traces.write_chunk(tmp_path / traces.CHUNKS / "00000", rows, metadata={"job": "f"})
    found = problems.read(ProblemsSection(**{"from": f"traces:{tmp_path}", "valid_fraction": 0}))
    assert [(problem.question, problem.answer) for problem in found.problems] == [(good, None)]
    assert found.left_out == {"duplicate": 1, "not_one_question": 2, "too_short": 1, "answered": 1, "cut": 1}


def test_example_turns_are_other_problems_with_cleaned_solutions(tmp_path, rows):
    found = problems.read(_section(_write(tmp_path / "a.jsonl", rows))).problems
    prompts = Prompts(PromptSection(examples=2, system="Be brief."), found)
    for problem in found:
        system, *turns, question = prompts.messages(problem, 1)
        assert system == {"role": "system", "content": "Be brief."}
        assert question == {"role": "user", "content": problem.question}
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
        assert problem.question not in [turn["content"] for turn in turns]
        assert all("<<" not in turn["content"] for turn in turns)
        assert all(extract_answer(turn["content"]) is not None for turn in turns[1::2])
    with pytest.raises(ConfigError, match="prompt.examples: use 1"):
        Prompts(PromptSection(examples=2), found[:2])


def test_new_problems_are_asked_for_by_showing_some(tmp_path, rows):
    found = problems.read(_section(_write(tmp_path / "a.jsonl", rows))).problems
    prompts = Prompts(PromptSection(task="write", shown=3), found)
    asked = {}
    for seed in range(50):
        (message,) = prompts.messages(found[0], seed)
        shown = [problem.question for problem in found if f"\n\n{problem.question}\n\n" in message["content"]]
        assert len(shown) == 3 and found[0].question in shown
        asked[seed] = message["content"]
    assert len(set(asked.values())) > 45 and asked[7] == prompts.messages(found[0], 7)[0]["content"]
