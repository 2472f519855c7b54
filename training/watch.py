"""What the trainer tells the world: it turns the run's state into records for `observe/`, on the main process only.

Every method may be called by every rank; all but the main one keep silent.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from checkpoints import RunState
from evaluation.perplexity import HeldOutLoss, mixed
from machine import hardware
from models.config import ModelConfig
from models.inference.decoding import Sampling, generate
from observe.metrics import MetricsLog
from observe.progress import Progress
from observe.trackers import open_tracker
from settings import as_plain
from training.parallel import Strategy
from training.settings import PhaseSection, RunConfig
from training.step_result import StepResult

if TYPE_CHECKING:
    from evaluation.probes import ProbeResult
    from tokenizer import Tokenizer


REPORT_SECONDS = 30  # at least, between two: to draw one takes a second or two, in which nothing trains


class Clock:
    """Seconds and tokens spent training: pauses for validation, probes and saves do not count as training speed."""

    def __init__(self) -> None:
        self._since = self._run_since = time.monotonic()
        self._tokens = 0

    def start(self) -> None:
        """Begin to measure speed anew."""
        self._since, self._tokens = time.monotonic(), 0

    def count(self, tokens: int) -> None:
        """Tokens trained since the last look."""
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """Since the last call."""
        now = time.monotonic()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        return rate

    @contextlib.contextmanager
    def paused(self, state: RunState) -> Iterator[None]:
        """Leave what happens inside out of the speed, but not out of the run's seconds."""
        self.tick(state)  # for what is saved inside
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began
        self.tick(state)

    def tick(self, state: RunState) -> None:
        """Bring the run's seconds up to date."""
        now = time.monotonic()
        state.seconds += now - self._run_since
        self._run_since = now


class Watch:
    """Metrics file, progress line, tracker, samples and report of one run."""

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        model_config: ModelConfig,
        total_steps: int,
        resumed: Path | None,
        state: RunState,
    ):
        self.config, self.strategy, self.model_config = config, strategy, model_config
        self.clock = Clock()
        self.active = strategy.is_main
        self._reported = time.monotonic()
        if not self.active:
            return
        folder = config.run.path
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.progress = Progress(total_steps)
        self.metrics.rewind(*((state.step, state.done_at_step) if resumed else (0,)))
        self.tracker = open_tracker(config.watch.wandb, folder, as_plain(config), say=self.say)
        environment = hardware.environment(strategy.device)
        self.peak_flops = self._peak_flops()
        if resumed and len(state.phases_done) == len(config.phases):
            return  # nothing is left to train
        self.event("resumed" if resumed else "started", state, environment=environment)
        if resumed:
            self.say(f"resumed from {resumed} at step {state.step}")

    def say(self, text: str) -> None:
        """One line for whoever looks at the terminal."""
        if self.active:
            self.progress.note(text)

    def event(self, name: str, state: RunState, **details: Any) -> None:
        """Record that something happened."""
        if self.active:
            self._record({"kind": "event", "event": name, **self._place(state), **details})

    def train_step(self, phase: PhaseSection, state: RunState, loss: float, result: StepResult) -> None:
        """Record one optimizer step: `loss` in nats a token, over the global batch."""
        self.clock.tick(state)
        if not self.active:
            return
        rate = self.clock.tokens_per_second()
        flops = self.model_config.flops_per_token(phase.context)
        optimizer = self.config.optimizer
        record = {
            "kind": "train",
            **self._place(state),
            "loss": loss,
            "lr": result.learning_rate * (optimizer.muon_lr or optimizer.adamw_lr),
            "grad_norm": float(result.grad_norm),
            "tokens_per_second": rate,
            "mfu": hardware.flops_utilization(rate, flops, self.peak_flops, self.strategy.world),
            "memory_bytes": hardware.memory_in_use(self.strategy.device),
            "seconds": round(state.seconds, 3),
            "skipped": state.skipped,
        }
        self._record(record)
        self.progress.update(record)

    def validation(
        self, phase: PhaseSection, state: RunState, losses: dict[str, HeldOutLoss], phase_end: bool
    ) -> float:
        """Record held-out losses by source; returns the mixture's loss in nats a token."""
        if not losses:
            return float("nan")
        whole = mixed(losses, phase.data)
        if self.active:
            sources = {name: _held_out(loss) for name, loss in losses.items()}
            self._record(
                {
                    "kind": "validation",
                    **self._place(state),
                    "val_loss": whole.val_loss,
                    "bits_per_byte": whole.bits_per_byte,
                    "perplexity": whole.perplexity,
                    "sources": sources,
                    "phase_end": phase_end,
                }
            )
            tokens = sum(loss.tokens for loss in losses.values())
            self.say(
                f"{phase.name}: validation loss {whole.val_loss:.4f} nats/token, perplexity {whole.perplexity:.2f}, "
                f"{whole.bits_per_byte:.4f} bits/byte at step {state.step}, on {tokens:,.0f} tokens"
            )
            for name, loss in losses.items():
                if loss.divergence is not None:
                    self.say(f"{phase.name}: {name} is {loss.divergence:.4f} nats/token from the teacher")
        return whole.val_loss

    def probe(self, phase: PhaseSection, state: RunState, name: str, when: str, result: "ProbeResult") -> None:
        """Record how many held-out questions were answered, before (`start`) or after (`end`) a phase."""
        counts = {key: getattr(result, key) for key in ("correct", "total", "accuracy", "low", "high")}
        self._record({"kind": "probe", **self._place(state), "probe": name, "when": when, **counts})
        order = {"start": "before", "end": "after"}[when]
        self.say(
            f"{name} {order} phase {phase.name}: {result.correct}/{result.total} = {result.accuracy:.1%} "
            f"(95% interval {result.low:.1%} to {result.high:.1%})"
        )

    def bigram_floors(self, phase: PhaseSection, floors: dict[str, float]) -> None:
        """Record what a Kneser-Ney bigram model reaches on each source's held-out text."""
        for source, loss in floors.items():
            event = {"kind": "event", "event": "bigram_floor", "phase": phase.name}
            self._record({**event, "source": source, "loss": loss})

    def samples(
        self, model: nn.Module, tokenizer: "Tokenizer", state: RunState, never: list[int], on_token: Callable[..., None]
    ) -> None:
        """Let the model continue each prompt, without the tokens that are `never` drawn, and record what it wrote;
        `on_token` is called as it writes."""
        if not self.active:
            return
        settings = self.config.watch
        with self.strategy.autocast():
            for number, prompt in enumerate(settings.sample_prompts):
                ids = [tokenizer.begin_of_text, *tokenizer.encode(prompt)]
                sampling = Sampling(temperature=0.8, top_p=0.95, seed=self.config.run.seed + number)
                (new,) = generate(model, [ids], settings.sample_tokens, [tokenizer.end_of_text], sampling, on_token,
                                  tokenizer.vocab_size, never=never)  # fmt: skip
                text = tokenizer.continuation(ids, new)
                self._record({"kind": "sample", **self._place(state), "prompt": prompt, "text": text})
                self.say(f"sample at step {state.step}: {prompt}{text}")

    def checkpoint(self, state: RunState) -> None:
        """Mark in the metrics that a checkpoint is about to be written."""
        self.metrics.mark_checkpoint(state.step, self._phase_name(state), state.tokens, state.done_at_step)

    def place_in_metrics(self) -> int:
        """Where the next record will stand, for `forget_since`."""
        return self.metrics.size() if self.active else 0

    def forget_since(self, place: int) -> None:
        """Drop the records made since."""
        if self.active:
            self.metrics.truncate(place)

    def phase_started(self, phase: PhaseSection, state: RunState) -> None:
        """A phase begins."""
        self.event("phase_start", state, context=phase.context)
        self.say(f"phase {phase.name}: context {phase.context}, {phase.steps} steps of {phase.batch_tokens:,} tokens")

    def phase_ended(self, phase: PhaseSection, state: RunState) -> None:
        """A phase has ended."""
        self.event("phase_end", state, context=phase.context)

    def report(self, in_the_end: bool = False) -> None:
        """Write report.html as the run stands, unless the last one is so new that drawing would cost more than it
        shows; a report that cannot be drawn stops nothing."""
        now = time.monotonic()
        if self.active and (in_the_end or now - self._reported >= REPORT_SECONDS):
            from observe.report import write_report

            self._reported = now
            try:
                write_report(self.config.run.path)
            except Exception as error:  # noqa: BLE001  whatever a plotting library raises, training goes on
                self.say(f"report.html was not written: {type(error).__name__}: {error}")

    def close(self, last_words: str) -> None:
        """End the progress line, the tracker and the files; print the summary."""
        if not self.active:
            return
        self.progress.close()
        from observe.report import summary

        self.report(in_the_end=True)
        try:
            print(summary(self.config.run.path))
        except (OSError, ValueError) as error:  # somebody has removed the run's folder
            self.say(f"there is no summary: {error}")
        print(f"{last_words}\n{self.config.run.path / 'report.html'}", flush=True)
        self.tracker.close()
        self.metrics.close()

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        self.tracker.log(record)

    def _place(self, state: RunState) -> dict[str, Any]:
        return {"step": state.step, "phase": self._phase_name(state), "tokens": state.tokens}

    def _phase_name(self, state: RunState) -> str:
        """Of the phase that `state` is in; a finished run is in its last."""
        return self.config.phases[min(len(state.phases_done), len(self.config.phases) - 1)].name

    def _peak_flops(self) -> float | None:
        if self.strategy.device.type != "cuda":
            return None
        import torch

        return hardware.peak_flops(torch.cuda.get_device_name(self.strategy.device), self.strategy.dtype)


def _held_out(loss: HeldOutLoss) -> dict[str, float]:
    """What is recorded of one source."""
    told = {"val_loss": loss.val_loss, "bits_per_byte": loss.bits_per_byte}
    return told if loss.divergence is None else {**told, "divergence": loss.divergence}
