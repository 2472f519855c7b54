"""Does the trainer survive this device? Sections `run-kill-resume` and `checkpoint` of benchmarks/gpu_suite.py.

The command that a person types, `accelerate launch multigpu_train.py`, on the built-in corpus: one run without a break,
and beside it one that loses its box (SIGKILL to everything), is told to stop (SIGTERM) and ends by itself, each time
taken up by the same command. Both have to take the same steps with the same losses to the same weights, in every bit;
on a device whose sums have no order, which shows before the first break, the losses nearly. What a checkpoint of this
device holds has to be the same model on the CPU.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import result
from benchmarks.device import Findings, Row
from benchmarks.gpu_kernels import apart, spread_out
from models import ModelConfig

LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1", "--num_processes", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
PATIENCE = 600  # seconds for what takes some
LOSSES_APART = 0.02  # of a loss, where a device does not repeat itself: other data or weights show, no more than that
LOGITS_APART = 1e-4  # of the logits' norm, between a GPU's fp32 and the CPU's
TINY = ModelConfig(vocab_size=1024, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, window=32, context=128)
SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {
        "steps": 300, "save": 60, "context": 512, "batch_tokens": 16384, "micro_batch": 16, "documents": 8000,
        "vocab_size": 2048,
        "model": {"n_layers": 8, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_ff": 1408, "window": 128,
                  "global_every": 4},
    },
    "cpu": {
        "steps": 60, "save": 12, "context": 128, "batch_tokens": 1024, "micro_batch": 5, "documents": 100,
        "vocab_size": 1024,
        "model": {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128, "window": 32,
                  "global_every": 2},
    },
}  # fmt: skip


def run_kill_resume(findings: Findings) -> None:
    """A row for each thing that happens to the run, and one beside the unbroken run."""
    device = findings.device
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as name:
        folder = Path(name)
        with Launched(folder, "unbroken", device) as unbroken, Launched(folder, "broken", device) as broken:
            unbroken.start()
            for number in (signal.SIGKILL, signal.SIGTERM):
                enough = broken.steps() + unbroken.shape["save"] + 5
                broken.start()
                broken.until_step(enough)
                findings.add(broken.struck(number))
            broken.start()
            for run in (broken, unbroken):
                run.until_finished()
        findings.add(unbroken.told())
        findings.add(compared(unbroken, broken))
        last = sorted((broken.path / "checkpoints").iterdir())[-1]
        findings.add({"what": "its checkpoint", **on_both(last, device)})


class Launched:
    """A run in `folder`/NAME, started as often as somebody asks for it, and ended with the block."""

    def __init__(self, folder: Path, name: str, device: torch.device):
        import yaml

        self.name, self.path, self.device = name, folder / name, device
        self.shape = SHAPES[device.type]
        self._process: subprocess.Popen | None = None
        self._log = folder / f"{name}.log"
        self._config = folder / f"{name}.yaml"
        self._config.write_text(yaml.safe_dump(self._settings(folder)))

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self._strike(signal.SIGKILL)

    def _settings(self, folder: Path) -> dict[str, Any]:
        shape = self.shape
        tokens = shape["steps"] * shape["batch_tokens"]
        phase = {"name": "run", "data": {"stories": 1, "problems": 1}, "tokens": tokens}
        phase |= {key: shape[key] for key in ("context", "batch_tokens", "micro_batch")}
        sources = {kind: {"from": f"embedded:{kind}", "documents": shape["documents"]} for kind in phase["data"]}
        return {
            "run": {"name": self.name, "folder": str(folder)},
            "parallel": {"device": self.device.type, "processes": 1, "cpu_threads": 1},
            "model": shape["model"],
            "tokenizer": {"vocab_size": shape["vocab_size"]},
            "data": {"shards": str(folder / "shards"), "sources": sources},
            "phases": [phase],
            "checkpoint": {"every_steps": shape["save"], "every_minutes": None},
            "evaluation": {"every_steps": shape["save"] + 7, "tokens": 2000, "final_tokens": 4000},
            "watch": {"log_every": 1, "wandb": "off", "sample_tokens": 10},
        }

    def start(self) -> None:
        """The command that a person types."""
        command = [sys.executable, *LAUNCH, "multigpu_train.py", "--config", str(self._config)]
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(command, cwd=result.ROOT, stdout=log, stderr=log, start_new_session=True)

    def until_step(self, step: int) -> None:
        """Wait until it has taken so many. Raises RuntimeError if it ends before."""
        self._wait(lambda: self.steps() >= step or self._process.poll() is not None)
        if self.steps() < step:
            code = self._process.poll()
            raise RuntimeError(f"the run {self.name} ended with {code} before step {step}: {self._last_words()}")

    def until_finished(self) -> None:
        """Wait for its end. Raises RuntimeError if that is another than the end of its steps."""
        self._wait(lambda: self._process.poll() is not None)
        if self._process.returncode:
            raise RuntimeError(f"the run {self.name} ended with {self._process.returncode}: {self._last_words()}")

    def struck(self, number: signal.Signals) -> Row:
        """What becomes of a run when the signal comes to all of its processes: the steps it had taken, and the newest
        checkpoint. After SIGTERM nothing may be lost."""
        self._strike(number)
        steps, saved = self.steps(), self._saved()
        row = {"what": number.name, "step": steps, "saved": saved}
        if steps >= self.shape["steps"]:
            return {**row, "error": "it was at its end before the signal came", "holds": False}
        return {**row, "holds": saved == steps if number is signal.SIGTERM else 0 < saved <= steps}

    def _strike(self, number: int) -> None:
        """Send it to all, and wait until the last has ended: the launcher ends first, and holds no lock."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        self._wait(lambda: self._process.poll() is not None and not self._is_alive())

    def _is_alive(self) -> bool:
        import filelock

        if not self.path.is_dir():  # it never came so far
            return False
        try:
            with filelock.FileLock(self.path / ".lock", timeout=0):  # the run's own, held to its end
                return False
        except filelock.Timeout:
            return True

    def _wait(self, ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run {self.name} hangs: {self._last_words()}")
            time.sleep(0.02)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Those of the run's metrics, so far."""
        from observe.metrics import MetricsLog

        return [record for record in MetricsLog.read(self.path / "metrics.jsonl") if record["kind"] == kind]

    def steps(self) -> int:
        """How many it has taken."""
        return max((record["step"] for record in self.records("train")), default=0)

    def _saved(self) -> int:
        """The step of the newest checkpoint that has its name."""
        return max((int(path.name[5:13]) for path in (self.path / "checkpoints").glob("step-*")), default=0)

    def _last_words(self) -> str:
        return self._log.read_text()[-1000:] if self._log.exists() else ""

    def told(self) -> Row:
        """What the run says of itself."""
        trained = self.records("train")
        first, last = trained[0]["loss"], trained[-1]["loss"]
        rates = [record["tokens_per_second"] for record in trained if record.get("tokens_per_second")]
        return {"what": self.name, "step": trained[-1]["step"], "tokens_per_second": result.median(rates),
                "first_loss": first, "last_loss": last, "holds": last < 0.8 * first}  # fmt: skip


def compared(unbroken: Launched, broken: Launched) -> Row:
    """The broken run beside the unbroken one: its steps, losses, weights and optimizer state. `apart_before` is how far
    the losses are from each other before the first break, `apart` in the whole run, as shares of a loss."""
    from safetensors.torch import load_file

    steps = unbroken.shape["steps"]
    sides = [{record["step"]: record["loss"] for record in run.records("train")} for run in (unbroken, broken)]
    complete = all(list(side) == list(range(1, steps + 1)) for side in sides)
    apart_at = {step: abs(loss - sides[1].get(step, 0.0)) / loss for step, loss in sides[0].items()}
    resumed = [record["step"] for record in broken.records("event") if record["event"] == "resumed"]
    before = max((error for step, error in apart_at.items() if resumed and step <= resumed[0]), default=0.0)
    differ = 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run.path / "checkpoints" / f"step-{steps:08d}" / name) for run in (unbroken, broken))
        differ += sum(key not in other or not torch.equal(tensor, other[key]) for key, tensor in one.items())
    largest = max(apart_at.values())
    inexact = before > 0 and unbroken.device.type != "cpu"
    same = largest <= LOSSES_APART if inexact else not (largest or differ)
    return {"what": f"resumed at {' and '.join(map(str, resumed))}, beside unbroken", "step": max(sides[1]),
            "apart_before": before, "apart": largest, "tensors_that_differ": differ,
            "holds": complete and len(resumed) == 2 and same}  # fmt: skip


def on_both(path: Path, device: torch.device) -> Row:
    """A checkpoint's model on `device` and on the CPU: how far their logits are apart, fp32."""
    from checkpoints import load_model

    here, _, config = load_model(path, str(device))
    there, _, _ = load_model(path, "cpu")
    ids = torch.randint(config.vocab_size, (2, min(config.context, 100)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = apart(here(ids.to(device)), there(ids))
    return {"logits_apart": error, "holds": error <= LOGITS_APART}


def checkpoint_rows(findings: Findings) -> None:
    """Saved from the device, loaded there and on the CPU."""
    findings.add(checkpoint_row(findings.device))


def checkpoint_row(device: torch.device) -> Row:
    """The same bits of weights and optimizer state, the same logits on the device and, to rounding, on the CPU."""
    from checkpoints import RunState, checkpoint, load_model
    from tokenizer import Tokenizer
    from training.optimizer import MuonAdamW

    with torch.no_grad():
        model = spread_out(TINY)
    model = model.to(device)
    optimizer = MuonAdamW(model.named_parameters())
    ids = torch.randint(0, TINY.vocab_size, (2, TINY.context), device=device)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    tokenizer = Tokenizer.train(["a tokenizer for a round trip"] * 2, TINY.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(
            Path(folder), RunState(seed=3, step=1),
            model={name: tensor.cpu() for name, tensor in model.state_dict().items()},
            optimizer={name: tensor.cpu() for name, tensor in optimizer.tensors().items()},
            model_config=TINY, run_config={}, tokenizer=tokenizer,
        )  # fmt: skip
        loaded, _, _ = load_model(path, str(device))
        both = on_both(path, device)
        saved_optimizer = checkpoint.read_optimizer(path)
    with torch.no_grad():
        same_logits = torch.equal(loaded(ids[:, :-1]), model(ids[:, :-1]))  # a length that needs no compiler
    same_state = all(torch.equal(saved_optimizer[name], tensor.cpu()) for name, tensor in optimizer.tensors().items())
    return {"logits": "equal" if same_logits else "differ", "optimizer": "equal" if same_state else "differ",
            "logits_apart": both["logits_apart"], "holds": same_logits and same_state and both["holds"]}  # fmt: skip
