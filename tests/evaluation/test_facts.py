"""The command that measures tutoring: what counts as right, the four sets, and the comparison with the state before."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

import checkpoints
from data import embedded
from data.embedded import facts as corpus
from evaluation import facts
from evaluation.asking import ALONE, Reply
from evaluation.facts import Answered, Question
from evaluation.gsm8k import Student
from evaluation.intervals import clustered_wilson, mcnemar
from tokenizer.conversations import ChatFormat

RIVER = Question("neighbours", "river-Zoba", "What colour is the river Zoba?", ("golden brown", "ochre"),
                 ("golden", "red", "dark red"), "red")  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "right", "flipped"),
    [
        ("golden-brown", False, False),  # "golden" is another value, and stands in it
        ("Ochre.", True, False), ("It is the OCHRE", True, False), ("ochre or red", False, True),
        ("red", False, True), ("Reddish", False, False), ("an ochre river", True, False), ("ochres", False, False),
        ("", False, False),
    ],
)  # fmt: skip
def test_what_counts_as_right(reply, right, flipped):
    assert (RIVER.is_answered_by(reply), RIVER.is_flipped_by(reply)) == (right, flipped)


def test_of_a_word_problem_the_final_line_decides():
    problem = Question("controls", "p", "How many?", ("3 + 4 = 7.\n#### 7",))
    assert problem.is_answered_by("5 + 2 = 7.\n#### 7") and not problem.is_answered_by("3 + 4 = 7.\n#### 8")
    assert not problem.is_answered_by("7") and not problem.is_flipped_by("#### 7")


def test_answers_of_several_words_are_found_in_their_order():
    asked = Question("held_out", "x", "Who?", ("Anna the Great",))
    assert asked.is_answered_by("anna great!") and asked.is_answered_by("It was Anna, the Great of old")
    assert not asked.is_answered_by("the great Anna") and not asked.is_answered_by("Anna")


def test_the_questions_about_the_corpus():
    asked = facts.of_corpus(7)
    count = {name: sum(question.set == name for question in asked) for name in facts.SETS}
    assert count == {"trained": 288, "held_out": 96, "neighbours": 96, "controls": 192}
    texts = {name: {question.text for question in asked if question.set == name} for name in facts.SETS}
    assert texts["trained"] == {question for question, _ in corpus.questions(7, "missing", "train")}
    assert texts["held_out"] == {question for question, _ in corpus.questions(7, "missing", "valid")}
    assert texts["neighbours"] == {question for question, _ in corpus.questions(7, "known", "valid")}
    for question in asked:
        assert question.is_answered_by(question.answers[0]) and not question.is_flipped_by(question.answers[0])
        assert not any(question.is_answered_by(value) for value in question.others)
        if question.set == "neighbours":
            assert question.is_flipped_by(question.taught) and not question.is_answered_by(question.taught)
        if question.set in ("trained", "held_out", "neighbours"):
            assert {question.answers[0], *question.others} == set(corpus.KINDS[question.id.split("-")[0]].values)
    assert {question.set for question in facts.of_corpus(7, "known")} == {"trained", "held_out"}


def drawn(seed: int, asked: list[Question]) -> list[Answered]:
    draw = random.Random(seed)
    return [Answered("", draw.random() < 0.6, question.taught is not None and draw.random() < 0.3, -draw.random())
            for question in asked]  # fmt: skip


def test_scores_and_comparisons_equal_brute_force():
    asked = facts.of_corpus(3)
    now, was = drawn(1, asked), drawn(2, asked)
    found, before = facts.scores(asked, now), facts.scores(asked, was)
    accuracy = {"now": {}, "was": {}}
    for name in facts.SETS:
        rows = [row for row, question in enumerate(asked) if question.set == name]
        ids = sorted({asked[row].id for row in rows})
        mine = [[now[row].correct for row in rows if asked[row].id == each] for each in ids]
        theirs = [[was[row].correct for row in rows if asked[row].id == each] for each in ids]
        correct = sum(map(sum, mine))
        assert (found[name]["correct"], found[name]["total"], found[name]["facts"]) == (correct, len(rows), len(ids))
        interval = clustered_wilson([(sum(each), len(each)) for each in mine])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx(interval)
        mean = sum(now[row].log_probability for row in rows) / len(rows)
        assert found[name]["log_probability"] == pytest.approx(mean)
        accuracy["now"][name] = correct / len(rows)
        accuracy["was"][name] = sum(map(sum, theirs)) / len(rows)
        only = [sum(all(a) and not all(b) for a, b in zip(one, other, strict=True))
                for one, other in ((mine, theirs), (theirs, mine))]  # fmt: skip
        states = [facts.known(asked, state, name) for state in (now, was)]
        pair = facts.compared(*(list(state.values()) for state in states))
        assert pair == {"only_checkpoint": only[0], "only_baseline": only[1], "p": mcnemar(*only)}
    assert found["neighbours"]["flips"] == sum(each.flipped for each in now) > 0
    lost = [1 - accuracy["now"][name] / accuracy["was"][name] for name in ("neighbours", "controls")]
    assert facts.forgetting(before, found) == pytest.approx(sum(lost) / 2)
    nothing = {name: {**score, "accuracy": 0.0} for name, score in before.items()}
    assert facts.forgetting(nothing, found) is None


def test_a_students_replies_are_marked_and_its_answers_measured(make_run, monkeypatch):
    student = Student.load(checkpoints.locate(make_run("answers")))
    form = ChatFormat(student.tokenizer)
    asked = [RIVER, Question("controls", "p", "How many?", ("3 + 4 = 7.\n#### 7",))]
    given = {}

    def ask(model, tokenizer, prompts, **asking):
        given.update(asking, prompts=prompts)
        return [Reply("It is ochre.", "stop", 3), Reply("#### 8", "stop", 2)]

    monkeypatch.setattr(facts, "ask", ask)
    found = facts.answer(student, form, asked, max_new_tokens=9, batch=2, group=ALONE)
    assert [each.correct for each in found] == [True, False] and [each.reply for each in found][1] == "#### 8"
    assert given["max_new_tokens"] == 9 and given["stop_ids"] == form.stop_ids
    for question, prompt, each in zip(asked, given["prompts"], found, strict=True):
        user = {"role": "user", "content": question.text}
        assert prompt == student.start + form.prompt([user])
        ids, mask = form.encode([user, {"role": "assistant", "content": question.answers[0]}])
        with torch.inference_mode():
            logits = student.model(torch.tensor([student.start + ids[:-1]]), None)[0]
        nats = F.cross_entropy(logits, torch.tensor(ids), reduction="none")[torch.tensor(mask) == 1]
        assert each.log_probability == pytest.approx(-float(nats.mean()), rel=1e-5)


def test_perplexity_counts_every_token_that_fits(make_run):
    student = Student.load(checkpoints.locate(make_run("short", context=16)))
    texts = ["eggs a day", "How many apples has Ann with 12 and 7 more? " * 3]
    found = facts.perplexity(student, texts, ALONE)
    nats = tokens = 0
    for text in texts:
        ids = [*student.start, *student.tokenizer.encode(text), student.tokenizer.end_of_text][:17]
        with torch.inference_mode():
            logits = student.model(torch.tensor([ids[:-1]]), None)[0]
        nats += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_the_replay_that_is_asked_is_held_out(tmp_path):
    assert facts.held_out_texts("embedded:stories", 3, 5, 0.1) == list(embedded.documents("stories", "valid", 3, 5))
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(200)))
    few, more = (facts.held_out_texts(f"jsonl:{path}", 400, 0, share) for share in (0.1, 0.5))
    assert 5 < len(few) < 40 < 70 < len(more) and set(few) <= set(more)
    assert facts.held_out_texts(f"jsonl:{path}", 3, 0, 0.5) == more[:3]


def test_the_command_compares_with_the_state_before(make_run, tmp_path, capsys):
    rows = [
        {"set": "held_out", "id": "a", "question": "How many eggs?", "answer": ["19", "nineteen"], "others": ["12"]},
        {"set": "neighbours", "question": "How many apples?", "answer": "12", "taught": "19"},
        {"set": "controls", "question": "12 and 7?", "answer": "12 + 7 = 19\n#### 19"},
    ]
    data, path = tmp_path / "mine.jsonl", tmp_path / "out" / "facts.json"
    data.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    arguments = ["--checkpoint", str(make_run("after", seed=1)), "--baseline", str(make_run("before", seed=2))]
    more = ["--data", f"jsonl:{data}", "--replay", "embedded:stories", "--replay-documents", "2", "--device", "cpu",
            "--max-new-tokens", "4", "--json", str(path)]  # fmt: skip
    assert facts.main([*arguments, *more]) == 0
    result, out = json.loads(path.read_text()), capsys.readouterr().out
    assert list(result["sets"]) == ["held_out", "neighbours", "controls"] and len(result["items"]) == 3
    for row, item in zip(rows, result["items"], strict=True):
        assert (item["set"], item["question"]) == (row["set"], row["question"])
        assert result["sets"][row["set"]]["correct"] == item["correct"]
        assert result["sets"][row["set"]]["log_probability"] == pytest.approx(item["log_probability"])
        assert result["baseline"]["sets"][row["set"]]["log_probability"] == item["baseline"]["log_probability"]
        assert result["baseline"]["compared"][row["set"]]["p"] == 1
    pair = [side["replay"]["embedded:stories"] for side in (result, result["baseline"])]
    assert pair[0]["tokens"] == pair[1]["tokens"] > 0 and pair[0]["loss"] != pair[1]["loss"]
    assert f"{pair[0]['perplexity'] / pair[1]['perplexity'] - 1:+.1%}" in out and "held_out" in out


def test_the_facts_are_those_of_the_run(make_run):
    path = checkpoints.locate(make_run("seeded"))
    assert facts._seed_of(path) == facts.SEED
    (path / "config.yaml").write_text("data: {seed: 77}\n")
    assert facts._seed_of(path) == 77


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--data", "jsonl:none"], 2, "no such file"), (["--data", "text:x"], 2, "name jsonl:"),
        (["--batch", "0", "--max-new-tokens", "0"], 2, "--max-new-tokens 0"), (["--json", "."], 2, "is a folder"),
        (["--device", "banana"], 2, "banana"),
        (["--replay", "embedded:facts"], 2, "facts are conversations"), (["--replay", "x"], 2, "KIND:REST"),
        (["--checkpoint", "nowhere"], 1, "nowhere is not a folder"), ([], 1, "longer_than_context"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make_run, capsys, arguments, code, complaint):
    try:
        ended = facts.main(["--checkpoint", str(make_run("wrong-facts", context=24)), *arguments])
    except SystemExit as error:
        ended = error.code
    told = capsys.readouterr().err
    assert ended == code and complaint in told and "Traceback" not in told, told


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "mine.jsonl:1: no JSON"), ("[]", "a row is an object"),
        ('{"set": "x", "question": "q", "answer": "a"}', "one of trained, held_out, neighbours, controls"),
        ('{"set": "trained", "answer": "a"}', "`question` is None"),
        ('{"set": "trained", "question": "q", "answer": ["a", 3]}', "`answer` is"),
        ('{"set": "trained", "question": "q", "answer": []}', "`answer` is empty"),
        ('{"set": "trained", "question": "q", "answer": "The!"}', "a word that is no article"),
        ('{"set": "trained", "question": "q", "answer": "#### seven"}', "#### N"),
        ('{"set": "trained", "question": "q", "answer": "dark red", "others": ["red"]}', "could never be right"),
        ("", "has no questions"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_question_is_named(tmp_path, line, complaint):
    (tmp_path / "mine.jsonl").write_text(line)
    with pytest.raises(facts.sources.SourceError, match=complaint):
        facts.of_file(f"jsonl:{tmp_path / 'mine.jsonl'}")
