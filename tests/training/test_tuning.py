"""Tuning is an ordinary phase on conversations: the same loss however a batch is divided, the same run when stopped."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import checkpoint, locate, never_drawn
from data import embedded
from data.loader import IGNORE, PhaseLoader
from evaluation.probes import ProbeResult
from observe.metrics import MetricsLog
from settings import ConfigError, read, validate
from storage import folder
from tests import warm
from tests.training.test_distributed import ONE, losses
from tokenizer import Tokenizer
from tokenizer.chat import RESERVED
from training.settings import RunConfig
from training.start import start
from training.trainer import Outcome

STEPS = 8


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    """Word problems as questions and answers; a few of the answers are as long as no context is."""
    path = tmp_path_factory.mktemp("talks") / "rows.jsonl"
    found = [embedded.problem(index, "train", 5) for index in range(300)]
    rows = [{"question": task.question, "answer": task.solution} for task in found]
    rows += [{"question": f"Tell me all, {number} times.", "answer": "again " * 400} for number in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def tuning(tiny, talks):
    """tuning(name, *overrides): the arguments of a run of one phase on conversations, with plain text as replay."""

    def tuning(name: str, *overrides: str) -> list[str]:
        source = f'data.sources.talks={{from: "jsonl:{talks}", conversations: true}}'
        phase = ("{name: tune, context: 128, data: {talks: 0.8, stories: 0.2}, tokens: 16384, batch_tokens: 2048, "
                 "micro_batch: 16, learning_rate: {warmup: 0.2}}")  # fmt: skip
        return tiny(name, source, f"phases=[{phase}]", *overrides)

    return tuning


def train(arguments: list[str]) -> tuple[Outcome, Path]:
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    return start(config), config.run.path


def records(run: Path, kind: str) -> list[dict]:
    return [record for record in MetricsLog.read(run / "metrics.jsonl") if record["kind"] == kind]


def test_tuning_loss_is_the_same_for_one_and_two_processes_and_any_accumulation(tuning):
    """By the global count of trained tokens: the rows of a batch have very different numbers of them."""
    whole = None
    for processes in (1, 2):
        for accumulation in (1, 4):
            name = f"p{processes}a{accumulation}"
            arguments = tuning(name, f"phases.0.micro_batch={16 // processes // accumulation}")
            if processes == 1:
                assert train(arguments)[0] is Outcome.FINISHED
            else:
                launched = warm.ranks(2, *ONE, *arguments)
                assert [code for code, _ in launched] == [0, 0], launched
            found = losses(arguments)
            whole = whole or found
            assert found.keys() == whole.keys() == set(range(1, STEPS + 1))
            assert max(abs(found[step] - whole[step]) for step in whole) < 1e-5, name


def test_tuning_stopped_anywhere_resumes_bit_equal(tuning):
    _, whole = train(tuning("whole"))
    draw = random.Random(3)
    for stop in (1, draw.randint(2, 4), draw.randint(5, STEPS - 1)):
        assert train(tuning("broken", f"run.stop_after_steps={stop}"))[0] is Outcome.STOPPED
    assert train(tuning("broken"))[0] is Outcome.FINISHED
    broken = whole.with_name("broken")
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(path / "checkpoints" / f"step-{STEPS:08d}" / name) for path in (whole, broken))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert [r["loss"] for r in records(whole, "train")] == [r["loss"] for r in records(broken, "train")]


def test_what_a_tuning_phase_says_of_itself_counts_what_is_trained(tuning, capfd, monkeypatch):
    """Speed and utilisation count all positions that hold text, for all are computed; the run's tokens those that are
    trained; conversations have no bigram floor."""
    counted = []
    monkeypatch.setattr("training.watch.Clock.count", lambda _self, tokens: counted.append(tokens))
    outcome, folder = train(tuning("said"))
    shown = capfd.readouterr()
    assert outcome is Outcome.FINISHED
    assert "talks: 3 conversations are longer than the context of phase tune, 128" in shown.out + shown.err
    trained = records(folder, "train")[-1]["tokens"]
    assert 0 < trained < 0.8 * sum(counted) and 0.8 * 16384 < sum(counted) <= 16384
    text = (folder / "metrics.jsonl").read_text()
    floors = [json.loads(line) for line in text.splitlines() if "bigram" in line]
    assert floors and all("talks" not in floor.get("floors", floor) for floor in floors)


def test_only_answers_are_labels_and_every_batch_teaches(tuning, tmp_path):
    arguments = tuning("labels", "run.stop_after_steps=1", f"data.shards={tmp_path / 'shards'}")
    _, folder = train(arguments)
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    sources = {name: next(Path(config.data.shards).glob(f"{name}-*")) for name in ("talks", "stories")}
    loader = PhaseLoader(sources, {"talks": 1.0}, context=128, seed=1, phase=0, batch_rows=4, micro_rows=4)
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "checkpoints" / "step-00000001" / "tokenizer")
    marks = {tokenizer.token_id(mark) for mark in ("<|user|>", "<|assistant|>", "<|endoftext|>")}
    for first in range(0, 40, 4):
        (batch,) = loader.step(first)
        labels = batch.labels[batch.labels != IGNORE]
        assert len(labels) and not marks & set(labels.tolist())
        ends = (labels == tokenizer.token_id("<|end|>")).sum()
        assert ends == sum(len(set(row.tolist()) - {0}) for row in batch.document_ids)
    loader.close()


def test_a_context_that_no_conversation_fits_is_refused_before_the_first_step(tuning):
    """Also where it is a later phase's: nobody wants to hear of it after days."""
    phases = ("[{name: long, context: 128, data: {talks: 1}, tokens: 2048, batch_tokens: 2048}, "
              "{name: short, context: 8, data: {stories: 0.5, talks: 0.5}, tokens: 2048, batch_tokens: 64}]")
    with pytest.raises(ConfigError) as refused:
        train(tuning("short", f"phases={phases}", "watch.sample_prompts=[]"))
    (problem,) = refused.value.problems
    assert (problem.key, problem.value) == ("phases.1.context", 8)
    shortest = int(re.match(r"use (\d+) or more: all \d+ conversations of talks", problem.remedy)[1])
    phases = phases.replace("context: 8", f"context: {shortest}")
    phases = phases.replace("batch_tokens: 64", f"batch_tokens: {8 * shortest}")
    assert train(tuning("fits", f"phases={phases}", "watch.sample_prompts=[]"))[0] is Outcome.FINISHED


def test_newcomer_special_tokens_that_nothing_has_taught_are_never_drawn(tuning, monkeypatch):
    """What a phase's documents hold may be, from its first step on, by samples, probes, and whoever loads the run."""
    of_samples, of_probes = [], []

    def generate(_model, prompts, *_, never):
        of_samples.append(never)
        return [[] for _ in prompts]

    def word_problems(*_, never, **__):
        of_probes.append(never)
        return ProbeResult(1, 2, 0, 1)

    monkeypatch.setattr("training.watch.generate", generate)
    monkeypatch.setattr("evaluation.probes.word_problems", word_problems)
    plain = "{name: plain, context: 64, data: {stories: 1}, tokens: 2048, batch_tokens: 1024}"
    tune = ("{name: tune, context: 128, data: {talks: 1}, tokens: 4096, batch_tokens: 2048, probes: [word_problems], "
            "learning_rate: {warmup: 0.2}}")  # fmt: skip
    arguments = tuning("both", f"phases=[{plain}, {tune}]", "watch.sample_prompts=['']", "evaluation.every_steps=100")
    outcome, run = train(arguments)
    assert outcome is Outcome.FINISHED
    path = locate(run)
    tokenizer = Tokenizer.load(path / checkpoint.TOKENIZER)
    special = tokenizer.special_tokens
    untaught = [special[name] for name in ("<|pad|>", "<|system|>", *RESERVED)]
    turns = [special[name] for name in ("<|user|>", "<|assistant|>", "<|end|>")]
    assert of_samples == [sorted(untaught + turns), untaught]  # at the end of each phase
    assert of_probes == [untaught, untaught]
    assert checkpoint.read_state(path).special_tokens == sorted({0, *turns})
    assert never_drawn(path, tokenizer) == untaught
    with folder.write(run / "old") as old:  # by a version that recorded nothing
        for file in path.rglob("*"):
            if file.is_file() and file.name != folder.MANIFEST:
                (old / file.relative_to(path)).parent.mkdir(exist_ok=True)
                (old / file.relative_to(path)).write_bytes(file.read_bytes())
        state = json.loads((old / checkpoint.STATE).read_text())
        del state["special_tokens"]
        (old / checkpoint.STATE).write_text(json.dumps(state))
    ends = {special["<|endoftext|>"], special["<|end|>"]}
    assert never_drawn(run / "old", tokenizer) == sorted(set(special.values()) - ends)
    train(tuning("after", f"phases=[{plain}]", f"run.init_from={run}", "watch.sample_prompts=['']"))
    assert of_samples[-1] == untaught  # which the weights have learned before
