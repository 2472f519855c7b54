"""Batches without a finite gradient change nothing and are counted; losses that leap are flagged; too many end it."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import RunState
from observe.metrics import MetricsLog
from settings import read, validate
from tests import warm
from training import stability
from training.objectives import NextToken
from training.optimizer import MuonAdamW
from training.settings import RunConfig
from training.stability import Diverged
from training.start import start

SHORT = "phases=[{name: short, context: 64, data: {stories: 1}, tokens: 12288, batch_tokens: 1024, micro_batch: 8}]"


def train(arguments: list[str]) -> Path:
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    start(config)
    return config.run.path


def events(folder: Path, name: str) -> list[dict]:
    return [record for record in MetricsLog.read(folder / "metrics.jsonl") if record.get("event") == name]


def state_of(folder: Path) -> dict:
    return json.loads((sorted((folder / "checkpoints").iterdir())[-1] / "state.json").read_text())


def spoil(monkeypatch, samples: range, value: float) -> None:
    """The loss of these samples becomes `value` times what it is."""
    forward = NextToken.forward

    def spoiled(self, batch):
        loss, tokens, more = forward(self, batch)
        hit = any(int(sample) in samples for sample in batch.sample_ids)
        return loss * value if hit and self.training else loss, tokens, more

    monkeypatch.setattr(NextToken, "forward", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_without_a_finite_loss_is_skipped_counted_and_named(tiny, monkeypatch, value):
    spoil(monkeypatch, range(53, 54), value)  # in the fourth batch of 16
    folder = train(tiny("run", SHORT, "watch.log_every=5", "evaluation.every_steps=null"))
    (skipped,) = events(folder, "skipped")
    assert skipped["at"] == 4 and skipped["samples"] == [48, 64] and "grad_norm" in skipped["nonfinite"]
    state = state_of(folder)
    assert (state["step"], state["skipped"], state["skipped_in_a_row"]) == (12, 1, 0)
    rows = [record for record in MetricsLog.read(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert rows[-1]["skipped"] == 1 and math.isfinite(rows[-1]["loss"])


def test_a_skipped_batch_is_one_that_never_was(tiny, monkeypatch):
    """Weights and optimizer after it are those before it, to the last bit."""
    spoil(monkeypatch, range(48, 64), math.nan)
    saved = ["checkpoint.every_steps=1", "optimizer.weight_decay=0.1"]
    folder = train(tiny("run", SHORT, *saved)) / "checkpoints"
    for file in ("model.safetensors", "optimizer.safetensors"):
        before, after, later = ((folder / f"step-{step:08d}" / file).read_bytes() for step in (3, 4, 5))
        assert before == after != later


def test_a_resumed_run_has_the_same_skips(tiny, monkeypatch):
    spoil(monkeypatch, range(48, 80), math.nan)
    whole = train(tiny("whole", SHORT))
    for stop in (4, 5, 9):
        train(tiny("broken", SHORT, f"run.stop_after_steps={stop}"))
    broken = train(tiny("broken", SHORT))
    one, other = state_of(whole), state_of(broken)
    assert one["skipped"] == 2 and {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [event["at"] for event in events(broken, "skipped")] == [4, 5]


def test_too_many_in_a_row_end_the_run_with_a_diagnosis(tiny, monkeypatch):
    spoil(monkeypatch, range(48, 10_000), math.nan)
    with pytest.raises(Diverged, match=r"the last 3 batches .* phase short\) .*learning rate too high"):
        train(tiny("run", SHORT, "optimizer.most_skipped=3", "watch.log_every=1"))


def test_the_verdict_does_not_depend_on_when_the_steps_are_read(tiny, monkeypatch):
    """Three in a row and then good ones, all read together."""
    spoil(monkeypatch, range(32, 80), math.nan)
    with pytest.raises(Diverged, match=r"the last 3 batches \(up to step 5, phase short\)"):
        train(tiny("run", SHORT, "optimizer.most_skipped=3", "watch.log_every=8", "evaluation.every_steps=null",
                   "checkpoint.every_steps=null"))  # fmt: skip


def test_the_entry_says_so_without_a_traceback(tiny):
    """A learning rate that overflows."""
    arguments = tiny("run", SHORT, "optimizer.muon_lr=1e37", "optimizer.adamw_lr=1e37", "optimizer.most_skipped=2")
    command = [sys.executable, "multigpu_train.py", *arguments]
    done = warm.run(*command)
    assert done.returncode == 1
    assert "no number" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_leaps_is_flagged(tiny, monkeypatch):
    spoil(monkeypatch, range(35 * 16, 36 * 16), 4.0)
    folder = train(tiny("run", SHORT, "phases.0.tokens=45056", "evaluation.every_steps=null"))
    (spike,) = events(folder, "loss_spike")
    assert spike["at"] == 36 and spike["sigmas"] > 6 and spike["samples"] == [560, 576]


def test_the_running_mean_takes_leaps_in_but_slowly():
    state = RunState(seed=0)
    sigmas = [stability._leap(state, loss) for loss in [2.0, 2.1, 1.9, 2.05] * 10 + [5.0] * 40]
    assert max(sigmas[:40]) < 2 and sigmas[40] > 6
    assert 2.0 < state.loss_mean < 5.1 and sigmas[-1] < sigmas[40]


def optimizers() -> list[tuple[nn.Module, MuonAdamW]]:
    """Two of equal weights and equal state."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(6, 4), "embedding": nn.Embedding(5, 6)})
        optimizer = MuonAdamW(model.named_parameters(), weight_decay=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        made.append((model, optimizer))
    return made


@pytest.mark.parametrize("finite", [True, False])
def test_on_a_gpu_the_skip_is_masked_out_instead(finite):
    """What runs on CUDA, where nobody waits for the flag, does on the CPU what the branch does."""
    (one, first), (other, second) = optimizers()
    for model in (one, other):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if finite else torch.full_like(parameter, math.nan)
    first.step(only_if=torch.tensor(finite))
    second._update(torch.tensor(finite))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
