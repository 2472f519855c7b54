"""The command that asks word problems: what it asks, counts, compares, writes and refuses."""

from __future__ import annotations

import json
import sys

import pytest

import checkpoints
from evaluation import gsm8k, marking, problems, record
from evaluation.answers import RULES
from evaluation.asking import Reply
from evaluation.intervals import mcnemar, wilson
from evaluation.problems import Problem
from tests import warm
from tokenizer.conversations import ChatFormat

FEW = ("--max-new-tokens", "6", "--batch", "4", "--device", "cpu")


@pytest.fixture
def evaluate(tmp_path, capsys):
    """evaluate(*arguments) -> (exit code, result, stdout, stderr) of the command, in this process."""

    def evaluate(*arguments):
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        code = gsm8k.main([*map(str, arguments), *FEW, "--json", str(path)])
        told = capsys.readouterr()
        return code, json.loads(path.read_text()) if path.exists() else None, told.out, told.err

    return evaluate


def test_dev_is_what_the_run_held_out_and_its_figures_add_up(evaluate, make_run, word_problems):
    run, data = make_run("dev", valid_fraction=0.4), word_problems(30)
    code, result, out, err = evaluate("--checkpoint", run, "--data", f"jsonl:{data}")
    assert code == 0, err
    held_out = problems.on_side(problems.read(f"jsonl:{data}"), "valid", 0.4)
    assert [item["id"] for item in result["items"]] == [problem.id for problem in held_out] != []
    assert (result["asked"], result["problems"]) == ("zero-shot chat", len(held_out))
    state = result["greedy"]["zero-shot chat"]
    for rule in RULES:
        right = sum(item["correct"][rule] for item in result["items"])
        score = state["scores"][rule]
        assert (score["correct"], score["accuracy"]) == (right, right / len(held_out))
        assert [score["low"], score["high"]] == pytest.approx(wilson(right, len(held_out)))
    assert state["truncated"] == sum(item["finish"] == "length" for item in result["items"]) / len(held_out)
    assert "zero-shot chat" in out and "lm_eval_flexible" in out
    (entry,) = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert entry["split"] == "dev" and entry["digest"] == result["digest"]


def test_test_is_asked_once_and_a_second_time_is_told(evaluate, make_run, word_problems):
    run, data = make_run("test"), word_problems(5)
    arguments = ("--checkpoint", run, "--data", f"jsonl:{data}", "--split", "test")
    first, again, third = (evaluate(*arguments) for _ in range(3))
    assert first[1]["problems"] == 5 and "before" not in first[3]
    assert "was asked these test problems before (once," in again[3]
    assert "(2 times, last" in third[3]
    assert first[1]["items"] == again[1]["items"]
    other = word_problems(6, "other.jsonl")
    assert "before" not in evaluate("--checkpoint", run, "--data", f"jsonl:{other}", "--split", "test")[3]


def test_a_baseline_is_asked_both_ways_and_the_better_one_counts(evaluate, make_run, word_problems):
    run, before, data = make_run("tuned"), make_run("untuned", seed=1), word_problems(40)
    code, result, out, err = evaluate("--checkpoint", run, "--baseline", before, "--data", f"jsonl:{data}",
                                      "--valid-fraction", "0.4")  # fmt: skip
    assert code == 0, err
    told = result["baseline"]
    assert list(told["greedy"]) == ["zero-shot chat", "5-shot"]
    for rule in RULES:
        right = {name: state["scores"][rule]["correct"] for name, state in told["greedy"].items()}
        pair = told["compared"][rule]
        assert right[pair["state"]] == max(right.values())
        mine = [item["correct"][rule] for item in result["items"]]
        other = [item["baseline"][pair["state"]][rule] for item in result["items"]]
        assert pair["only_checkpoint"] - pair["only_baseline"] == sum(mine) - sum(other)
        assert pair["p"] == mcnemar(pair["only_checkpoint"], pair["only_baseline"])
    assert "against the baseline by the better" in out
    assert record.earlier(checkpoints.locate(before), {"digest": result["digest"]})


def test_examples_that_do_not_fit_the_context_are_left_out_and_told(evaluate, make_run, word_problems):
    run, data = make_run("short", context=128), word_problems(30)
    code, result, _, err = evaluate("--checkpoint", run, "--data", f"jsonl:{data}", "--shots", "3")
    assert code == 0, err
    assert result["asked"] in ("zero-shot", "1-shot", "2-shot") and f"asked {result['asked']}" in err


def test_samples_are_seeded_and_their_figures_are_those_of_the_items(evaluate, make_run, word_problems):
    run, data = make_run("sampled"), word_problems(4)
    arguments = ("--checkpoint", run, "--data", f"jsonl:{data}", "--valid-fraction", "1", "--samples", "3")
    code, result, out, err = evaluate(*arguments)
    assert code == 0, err
    assert evaluate(*arguments)[1]["samples"] == result["samples"]
    assert all(len(item["samples"]) == 3 for item in result["items"])
    for rule, scores in result["samples"]["scores"].items():
        share = sum(sample[rule] for item in result["items"] for sample in item["samples"]) / 12
        assert [scores["mean@3"], scores["pass@1"]] == pytest.approx([share, share])
        assert {"pass@2", "pass@3", "maj@1", "maj@2", "maj@3"} < set(scores)
    assert "maj@3" in out


def test_marks_and_sample_scores_of_known_replies():
    asked = [Problem("0", "2 + 2?", "4"), Problem("1", "3 + 4?", "Sum.\n#### 7")]
    said = [["#### 4", "It is 4.", "5", "5"], ["6", "#### 7", "none", "#### 7"]]
    marked = [[marking.mark(problem, Reply(text, "stop", 2)) for text in texts]
              for problem, texts in zip(asked, said, strict=True)]  # fmt: skip
    assert [each.correct["strict"] for each in marked[0]] == [True, False, False, False]
    assert [each.correct["flexible"] for each in marked[0]] == [True, True, False, False]
    scores = marking.sample_scores(asked, marked)
    interval = {"low": scores["flexible"].pop("low"), "high": scores["flexible"].pop("high")}
    assert interval["low"] < 0.5 < interval["high"]
    assert scores["flexible"] == pytest.approx({"mean@4": 0.5, "pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0,
                                                "maj@1": 0.5, "maj@2": 0.5, "maj@4": 1.0})  # fmt: skip
    assert scores["strict"]["maj@4"] == 1.0  # those without an answer have no vote
    first = [row[0] for row in marked]
    assert marking.scores(first)["strict"]["no_answer"] == 0.5 and marking.scores(first)["flexible"]["no_answer"] == 0
    states = {"a": first, "b": [row[1] for row in marked]}
    assert (marking.better(states, "strict"), marking.better(states, "flexible")) == ("a", "b")


def test_prompts_are_the_templates_and_the_plain_forms(make_run, word_problems):
    student = gsm8k.Student.load(checkpoints.locate(make_run("prompts")))
    tokenizer = student.tokenizer
    asked = problems.read(f"jsonl:{word_problems(9)}")
    chat = gsm8k.chat_prompts(asked[:1], student)
    question = [{"role": "user", "content": asked[0].question}]
    assert chat.ids == [[tokenizer.end_of_text, *ChatFormat(tokenizer).prompt(question)]]
    assert chat.stop_ids == ChatFormat(tokenizer).stop_ids and chat.stop_text is None
    plain = gsm8k.plain_prompts(asked[:1], student, asked[7:9])
    assert tokenizer.decode(plain.ids[0]) == (
        f"{tokenizer.end_of_text_token}Question: {asked[7].question}\nAnswer: She has 7 + 0 = 7 eggs.\n#### 7\n\n"
        f"Question: {asked[8].question}\nAnswer: She has 8 + 1 = 9 eggs.\n#### 9\n\n"
        f"Question: {asked[0].question}\nAnswer:"
    )
    assert (plain.name, plain.stop_text) == ("2-shot", "Question:")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [(["--data", "text"], 2, "write a source as KIND:REST"), (["--data", "jsonl:none.jsonl"], 2, "no such file"),
     (["--samples", "0"], 2, "--samples 0: use 1"), (["--samples", "2", "--temperature", "0"], 2, "all be the same"),
     (["--valid-fraction", "2"], 2, "--valid-fraction 2"), (["--split", "test", "--shots", "2"], 2, "--examples"),
     (["--shots", "99"], 1, "use fewer --shots"), (["--valid-fraction", "1e-9"], 1, "--valid-fraction"),
     (["--checkpoint", "nowhere"], 1, "nowhere is not a folder"), (["--json", "."], 2, "is a folder"),
     (["--device", "banana"], 2, "--device banana")],
)  # fmt: skip
def test_wrong_arguments_are_named(make_run, word_problems, capsys, arguments, code, complaint):
    given = ["--checkpoint", str(make_run("wrong")), "--data", f"jsonl:{word_problems(20)}", *arguments]
    try:
        ended = gsm8k.main(given)
    except SystemExit as error:
        ended = error.code
    told = capsys.readouterr().err
    assert (ended, "Traceback" in told) == (code, False), told
    assert complaint in told


def test_two_processes_write_what_one_writes(make_run, word_problems, tmp_path, evaluate):
    run, data = make_run("shared"), word_problems(11)
    arguments = ["--checkpoint", str(run), "--data", f"jsonl:{data}", "--split", "test", *FEW]
    _, alone, _, _ = evaluate(*arguments)
    command = [sys.executable, "-m", "evaluation.gsm8k", *arguments, "--json", str(tmp_path / "shared.json")]
    launched = warm.ranks(2, *command)
    assert [code for code, _ in launched] == [0, 0], launched
    shared = json.loads((tmp_path / "shared.json").read_text())
    assert {**shared, "environment": None} == {**alone, "environment": None}
    assert launched[1][1] == ""
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 2
