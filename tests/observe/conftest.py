"""A run folder as a training leaves it: three phases, validation, probes, samples, checkpoints, config."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from observe.metrics import MetricsLog
from storage import folder

CONFIG = """\
run: {name: synthetic}
phases:
  - {name: stories, context: 256, tokens: 102400}
  - {name: reasoning, context: 1024, tokens: 102400}
  - {name: long, context: 2048, tokens: 102400}
"""
PHASES = ("stories", "reasoning", "long")
STEP_TOKENS = 1024
PHASE_STEPS = 100
CORRECT = {  # of 200, at the start and the end of each phase
    "word_problems": {"stories": (0, 1), "reasoning": (2, 120), "long": (118, 110)},
    "recall": {"stories": (3, 2), "reasoning": (4, 12), "long": (10, 150)},
}


def probe_record(phase: str, step: int, probe: str, when: str, correct: int, total: int = 200) -> dict:
    """A probe record with an interval that is wide enough to be one; what kind it is does not matter here."""
    share = correct / total
    half = 1.96 * math.sqrt(max(share * (1 - share), 0.001) / total)
    low, high = max(0.0, share - half), min(1.0, share + half)
    return {"kind": "probe", "step": step, "phase": phase, "tokens": step * STEP_TOKENS, "probe": probe, "when": when,
            "correct": correct, "total": total, "accuracy": share, "low": low, "high": high}  # fmt: skip


def record_phase(log: MetricsLog, place: int, steps: int = PHASE_STEPS, ended: bool = True) -> None:
    """Everything that one phase leaves in the log."""
    phase, first = PHASES[place], place * PHASE_STEPS
    at = {"phase": phase, "step": first, "tokens": first * STEP_TOKENS}
    log.append({"kind": "event", "event": "phase_start", **at})
    for probe, counts in CORRECT.items():
        log.append(probe_record(phase, first, probe, "start", counts[phase][0]))
    for step in range(first + 1, first + steps + 1):
        at = {"phase": phase, "step": step, "tokens": step * STEP_TOKENS}
        loss = 2.0 + 5.0 * math.exp(-step / 60) + 0.1 * math.sin(step * 7.3)
        log.append({"kind": "train", **at, "loss": loss, "lr": 0.02 * (1 - (step - first) / 101),
                    "grad_norm": 0.5 + 20 / step, "tokens_per_second": 12000.0 - 2500 * place + 300 * math.sin(step),
                    "mfu": None, "memory_bytes": 900_000_000 + 10**8 * place, "seconds": step * 0.4})  # fmt: skip
        if step % 25 == 0:
            loss = 2.1 + 5.0 * math.exp(-step / 60)
            sources = {"stories": {"val_loss": loss - 0.2, "bits_per_byte": 0.9}}
            if place:
                sources["textbooks"] = {"val_loss": loss + 0.4, "bits_per_byte": 1.3}
            log.append({"kind": "validation", **at, "val_loss": loss, "bits_per_byte": loss / 2.6,
                        "perplexity": math.exp(loss), "sources": sources,
                        "phase_end": ended and step == first + steps})  # fmt: skip
            log.append(
                {
                    "kind": "sample",
                    **at,
                    "prompt": "Once upon a time",
                    "text": " there was a small dog. It ran to the river.",
                }
            )
    if ended:
        for probe, counts in CORRECT.items():
            log.append(probe_record(phase, at["step"], probe, "end", counts[phase][1]))
        log.append({"kind": "event", "event": "bigram_floor", "phase": phase, "source": "stories", "loss": 3.4})
        log.append({"kind": "event", "event": "phase_end", **at})
    log.mark_checkpoint(**at)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(phases=3, unfinished=0): a run folder with `phases` whole phases and some steps of the next one."""

    def make(phases: int = 3, unfinished: int = 0) -> Path:
        run_folder = tmp_path / "runs" / "synthetic"
        run_folder.mkdir(parents=True)
        (run_folder / "config.yaml").write_text(CONFIG)
        log = MetricsLog(run_folder / "metrics.jsonl")
        if phases or unfinished:
            started = {"step": 0, "phase": "stories", "tokens": 0, "environment": {"torch": "2.13.0", "cores": 2}}
            log.append({"kind": "event", "event": "started", **started})
        for place in range(phases):
            record_phase(log, place)
        if unfinished:
            record_phase(log, phases, steps=unfinished, ended=False)
        log.close()
        for step in (100, 200):
            with folder.write(run_folder / "checkpoints" / f"step-{step:08d}") as path:
                (path / "model.safetensors").write_bytes(b"w" * 3000)
        return run_folder

    return make
