"""The command that measures how a checkpoint converses: the masked loss, and the shares of its own answers."""

from __future__ import annotations

import errno
import json
import math

import pytest
import torch
import torch.nn.functional as F

import checkpoints
from checkpoints import load_model
from data import conversations
from evaluation import chat, record
from evaluation.asking import Processes
from evaluation.intervals import wilson
from storage import folder
from tokenizer.conversations import ChatFormat


@pytest.fixture
def talk(tmp_path):
    """talk(count) -> a JSONL file of so many conversations, each question asked twice, of one to three answers."""

    def talk(count):
        rows = []
        for n in range(count):
            turns = [{"role": "user", "content": f"How many eggs has Ann, number {n // 2}?"}]
            for turn in range(1 + n % 3):
                turns += [{"role": "assistant", "content": f"{n} eggs" + " a day" * turn}]
                turns += [{"role": "user", "content": "And apples?"}] if turn < n % 3 else []
            rows.append({"messages": turns})
        path = tmp_path / "talk.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return talk


def test_the_loss_is_that_of_the_tokens_in_the_mask(make_run, talk, monkeypatch):
    path = checkpoints.locate(make_run("talks"))
    model, tokenizer, config = load_model(path)
    form, start = ChatFormat(tokenizer), [tokenizer.end_of_text]
    rows = [json.loads(line) for line in talk(11).read_text().splitlines()]
    asked, left_out = chat.encoded([conversations.of_row(row) for row in rows], form, start, config.context)
    assert len(asked) == 11 and left_out == {}
    found = chat.losses(model, asked)
    for row, each, (nats, tokens) in zip(rows, asked, found, strict=True):
        ids, mask = form.encode(row["messages"])
        assert each.ids == start + ids and tokens == sum(mask)
        with torch.inference_mode():
            logits = model(torch.tensor([start + ids[:-1]]), None)[0]
        every = F.cross_entropy(logits, torch.tensor(ids), reduction="none")
        assert nats == pytest.approx(float((every * torch.tensor(mask)).sum()), rel=1e-5)
    parts = []
    monkeypatch.setattr(Processes, "gather", lambda self, mine: parts.append(mine) or dict(enumerate(found)) | mine)
    for rank in range(2):
        assert chat.losses(model, asked, Processes(rank, 2)) == found
    assert sorted(row for part in parts for row in part) == list(range(11))


def test_what_cannot_be_asked_is_counted(make_run):
    _, tokenizer, _ = load_model(make_run("counts"))
    form = ChatFormat(tokenizer)
    texts = [conversations.of_row({"question": "How many? " * n, "answer": "12 eggs"}) for n in (1, 100)]
    asked, left_out = chat.encoded(texts, form, [tokenizer.end_of_text], 64)
    assert [each.text for each in asked] == texts[:1] and left_out == {"longer_than_context": 1}
    exact = len(asked[0].ids) - 1
    assert chat.encoded(texts[:1], form, [tokenizer.end_of_text], exact)[1] == {}
    assert chat.encoded(texts[:1], form, [tokenizer.end_of_text], exact - 1)[1] == {"longer_than_context": 1}


@pytest.mark.parametrize(
    ("text", "leaks"),
    [("She has 19.", False), ("She has <|user|>", True), ("a <|assistant|> b", True),
     ("It is 7.\nUser: and you?", True),
     ("Human: hello", True), ("the user: Ann", False), ("A\n  Assistant: B", True),
     ("User", False), ("<|end|>", False)],
)  # fmt: skip
def test_roles_that_leak(make_run, text, leaks):
    _, tokenizer, _ = load_model(make_run("leaks"))
    assert chat.leaks_role(text, tokenizer, ChatFormat(tokenizer)) is leaks


def test_an_answer_ends_rightly_only_by_the_end_of_the_turn(make_run, monkeypatch):
    from evaluation import asking

    model, tokenizer, _ = load_model(make_run("ends"))
    form = ChatFormat(tokenizer)
    said = [[20, 21], [20, tokenizer.end_of_text, 22], [20] * 9]

    def generate(model, prompts, most, stop_ids, sampling, on_token, entries, seeds, never):
        assert stop_ids == [form.end_of_turn] and never == [7]
        for row, ids in enumerate(said):
            for token in ids[:most]:
                on_token(row, token)

    monkeypatch.setattr("models.inference.decoding.generate", generate)
    found = chat.answers(model, tokenizer, form, [[1], [1], [1]], max_new_tokens=5, never=[7], group=asking.ALONE)
    assert [stopped for _, stopped in found] == [True, False, False]
    assert [reply.text for reply, _ in found] == [tokenizer.decode(ids) for ids in ([20, 21], [20], [20] * 5)]
    assert [reply.finish for reply, _ in found] == ["stop", "stop", "length"]


def test_the_command_asks_what_was_held_out(make_run, talk, tmp_path, capsys):
    run, data = make_run("command", valid_fraction=0.5), talk(40)
    path = tmp_path / "out" / "chat.json"
    arguments = ["--checkpoint", str(run), "--data", f"jsonl:{data}", "--max-new-tokens", "8", "--device", "cpu"]
    assert chat.main([*arguments, "--answers", "5", "--json", str(path)]) == 0
    result, out = json.loads(path.read_text()), capsys.readouterr().out
    texts = [conversations.of_row(json.loads(line)) for line in data.read_text().splitlines()]
    held_out = chat.held_out(texts, 0.5)
    assert 0 < len(held_out) < 40 and result["conversations"] == len(held_out)
    asked = [conversations.question_of(text) for text in held_out]
    assert all(asked.count(question) == 2 for question in asked)  # both answers to a question are on its side
    nats, tokens = (sum(item[name] for item in result["items"]) for name in ("nats", "trained_tokens"))
    assert (result["loss"], result["trained_tokens"]) == (nats / tokens, tokens)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    answered = [item for item in result["items"] if "text" in item]
    assert len(answered) == result["answers"] == 5
    stops = sum(item["stopped"] for item in answered)
    assert result["stops"]["count"] == stops and result["stops"]["low"] == pytest.approx(wilson(stops, 5)[0])
    assert f"loss {result['loss']:.4f} nats" in out
    assert chat.main([*arguments, "--all", "--limit", "30", "--answers", "1", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["conversations"] == 30


def test_a_result_that_has_no_room_is_told_all_the_same(make_run, talk, tmp_path, capsys, monkeypatch):
    def full(path, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = make_run("full")
    monkeypatch.setattr(folder, "write_file", full)
    path = tmp_path / "new" / "result.json"
    arguments = ["--checkpoint", str(checkpoint), "--data", f"jsonl:{talk(4)}", "--all", "--json", str(path)]
    assert chat.main([*arguments, "--answers", "1", "--max-new-tokens", "2"]) == 1
    told = capsys.readouterr()
    assert "nats a trained token" in told.out and str(path) in told.err and told.err.count("\n") == 1
    (tmp_path / "file").touch()
    assert "is a file" in record.fault(tmp_path / "file" / "result.json")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [(["--data", "jsonl:none"], 2, "no such file"), (["--limit", "0"], 2, "--limit 0"),
     (["--json", "."], 2, "--json .: that is a folder"), (["--device", "banana"], 2, "banana"),
     (["--valid-fraction", "1e-9"], 1, "use --all"), (["--checkpoint", "nowhere"], 1, "nowhere is not a folder")],
)  # fmt: skip
def test_wrong_arguments_are_named(make_run, talk, capsys, arguments, code, complaint):
    try:
        ended = chat.main(["--checkpoint", str(make_run("wrong-chat")), "--data", f"jsonl:{talk(4)}", *arguments])
    except SystemExit as error:
        ended = error.code
    told = capsys.readouterr().err
    assert ended == code and complaint in told and "Traceback" not in told, told
