"""Asking in batches: the same replies whatever the batch and however many processes, each ended where it should be."""

from __future__ import annotations

import pytest
import torch

from checkpoints import load_model
from evaluation.asking import Processes, ask, batches, seed_of
from models.inference.decoding import generate
from models.inference.sampling import Sampling


@pytest.fixture(scope="module")
def student(make_run):
    model, tokenizer, _ = load_model(make_run("asked", context=64))
    model.double()  # in which rounding turns no choice
    return model, tokenizer


def _prompts(count):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(16, 300, (3 + 5 * row % 17,), generator=draw).tolist() for row in range(count)]


def test_batches_hold_every_prompt_once_the_longest_first():
    prompts = _prompts(23)
    rows = [row for part in batches(prompts, 4) for row in part]
    assert sorted(rows) == list(range(23))
    lengths = [len(prompts[row]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_each_reply_is_what_the_prompt_alone_gets(student, batch):
    model, tokenizer = student
    prompts = _prompts(11)
    replies = ask(model, tokenizer, prompts, max_new_tokens=12, stop_ids=[tokenizer.end_of_text], batch=batch)
    for prompt, reply in zip(prompts, replies, strict=True):
        (alone,) = generate(model, [prompt], 12, [tokenizer.end_of_text], Sampling(temperature=0.0), None,
                            tokenizer.vocab_size)  # fmt: skip
        assert reply.text == tokenizer.decode(alone)
        assert (reply.tokens, reply.finish) == (len(alone), "stop" if len(alone) < 12 else "length")


def test_draws_have_the_seed_of_their_prompt(student):
    model, tokenizer = student
    prompts, seeds = _prompts(7), [seed_of(5, row) for row in range(7)]
    hot = Sampling(temperature=1.0, top_k=20)
    options = {"max_new_tokens": 8, "stop_ids": [], "sampling": hot}
    together = ask(model, tokenizer, prompts, seeds=seeds, batch=3, **options)
    for row in range(7):
        assert ask(model, tokenizer, [prompts[row]], seeds=[seeds[row]], **options) == [together[row]]
    others = ask(model, tokenizer, prompts, seeds=[seed + 1 for seed in seeds], batch=3, **options)
    assert others != together
    with pytest.raises(ValueError, match="a seed for each"):
        ask(model, tokenizer, prompts, **options)


def test_processes_share_the_batches_and_each_knows_all(student, monkeypatch):
    model, tokenizer = student
    prompts = _prompts(13)
    options = {"max_new_tokens": 6, "stop_ids": [], "batch": 3}
    alone = ask(model, tokenizer, prompts, **options)
    parts = []
    monkeypatch.setattr(Processes, "gather", lambda self, mine: parts.append(mine) or dict(enumerate(alone)) | mine)
    for rank in range(3):
        assert ask(model, tokenizer, prompts, group=Processes(rank, 3), **options) == alone
    assert sorted(row for part in parts for row in part) == list(range(13))


def test_a_stop_text_ends_a_reply_and_the_batch(student):
    model, tokenizer = student
    prompts = _prompts(6)
    whole = ask(model, tokenizer, prompts, max_new_tokens=40, stop_ids=[])
    mark = whole[0].text[8:11]
    calls = []
    step, model.step = model.step, lambda *arguments, **how: calls.append(1) or step(*arguments, **how)
    try:
        cut = ask(model, tokenizer, prompts, max_new_tokens=40, stop_ids=[], stop_text=mark)
        (short,) = ask(model, tokenizer, prompts[:1], max_new_tokens=40, stop_ids=[], stop_text=whole[0].text[:1])
    finally:
        model.step = step
    assert short.text == "" and short.finish == "stop" and short.tokens == 1
    for before, after in zip(whole, cut, strict=True):
        assert after.text == before.text.partition(mark)[0]
        assert after.finish == ("stop" if mark in before.text else "length")
    assert cut[0].finish == "stop" and cut[0].tokens < 40


def test_a_batch_ends_when_all_its_rows_have(student):
    """Also where one ended by a stop token, of which nobody is told, long before the others came to the stop text."""
    model, tokenizer = student
    prompts = _prompts(2)
    whole = [generate(model, [prompt], 50, [], Sampling(temperature=0.0))[0] for prompt in prompts]
    stop_ids = [next(token for token in whole[0] if token not in whole[1])]
    last = tokenizer.decode(whole[1][:25])
    mark = next(last[-n:] for n in range(1, len(last)) if last.find(last[-n:]) == len(last) - n)
    calls = []
    step, model.step = model.step, lambda ids, state, **how: calls.append(ids.shape) or step(ids, state, **how)
    try:
        replies = ask(model, tokenizer, prompts, max_new_tokens=50, stop_ids=stop_ids, stop_text=mark)
    finally:
        model.step = step
    assert [reply.finish for reply in replies] == ["stop", "stop"]
    assert len(calls) < 45


def test_a_prompt_without_room_gets_no_reply(student):
    model, tokenizer = student
    prompts = [[20] * 64, [20] * 60, [20] * 5]
    replies = ask(model, tokenizer, prompts, max_new_tokens=10, stop_ids=[])
    assert [(reply.finish, reply.tokens) for reply in replies] == [("no_room", 0), ("length", 4), ("length", 10)]


def test_progress_counts_this_processs_prompts(student):
    model, tokenizer = student
    seen = []
    ask(model, tokenizer, _prompts(5), max_new_tokens=2, stop_ids=[], batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)]
