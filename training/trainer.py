"""The loop: a run is a list of phases, a phase is a list of steps, and everything in between can be taken up again.

`Trainer.run` reads from top to bottom: resume or start, then for each phase train, validate, save; `_train_step` is
the one train step of the project. What a step does depends only on (config, seed, RunState), never on the number of
processes; see data/loader.py for the order of samples and training/schedule.py for the learning rate.
"""

import dataclasses
import enum
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch

import checkpoints
from checkpoints import checkpoint
from data.loader import Batch, PhaseLoader
from data.prepare import Prepared
from models import build_model, host
from models.attention import choose_kernel
from settings import as_plain, differences
from storage import folder
from training import examine
from training.objectives import NextToken
from training.optimizer import MuonAdamW
from training.parallel import Strategy
from training.schedule import multiplier
from training.settings import PhaseSection, RunConfig
from training.watch import Watch

LARGE_FOR_A_CPU = 8_000_000  # parameters, from which memory matters more than the last tenth of the speed
SAMPLE_ORDER = ("name", "context", "data", "batch_tokens")  # settings of a phase that decide what sample k of it is


class Outcome(enum.Enum):
    """How a run came to its end; the value is the process's exit code."""

    FINISHED = 0
    STOPPED = 75  # saved, and the same command goes on from there (EX_TEMPFAIL)


class RunMismatch(RuntimeError):
    """The run's folder holds another run than the config describes; the message names what differs."""


@dataclasses.dataclass
class StepResult:
    """What one optimizer step gave; tensors stay on the device until somebody looks."""

    loss_sum: torch.Tensor  # over this rank's tokens, nats
    tokens: int  # trained, all ranks
    learning_rate: float  # multiplier of the peaks
    grad_norm: torch.Tensor


class Trainer:
    """One run on this process. All ranks build the same."""

    def __init__(self, config: RunConfig, strategy: Strategy, prepared: Prepared):
        self.config, self.strategy, self.prepared = config, strategy, prepared
        self.folder: Path = config.run.path
        self.state = checkpoints.RunState(seed=config.run.seed)
        self.model_config = config.model.config(prepared.tokenizer.vocab_size, config.longest_context)
        if strategy.device.type == "cpu" and self.model_config.parameters()["total"] >= LARGE_FOR_A_CPU:
            host.return_memory()
        self.model = build_model(self.model_config, config.run.seed)
        self.objective = NextToken(self.model)
        self.wrapped = strategy.prepare(self.objective)
        self.optimizer = self._build_optimizer()
        resumed = self._restore()
        self.total_steps = self._total_steps()
        self.watch = Watch(config, strategy, self.model_config, self.total_steps, resumed, self.state)
        kernel = choose_kernel(strategy.device, self.model_config.d_head)
        self.watch.say(f"attention: {kernel.name} ({kernel.reason})")
        self._stop_requested = False
        self._saved_at = time.monotonic()

    def run(self) -> Outcome:
        """Train all phases that are left."""
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._request_stop)
        while len(self.state.phases_done) < len(self.config.phases):
            if not self._run_phase(self._phase):
                self.watch.event("stopped", self.state)
                self.watch.close(f"stopped at step {self.state.step}: {self._way_on()}")
                return Outcome.STOPPED
        self.watch.close(f"finished: {self.state.step} steps, {self.state.tokens:,} tokens")
        return Outcome.FINISHED

    @property
    def _phase(self) -> PhaseSection:
        """The current phase."""
        return self.config.phases[len(self.state.phases_done)]

    def _run_phase(self, phase: PhaseSection) -> bool:
        """One phase from where it stands; False when asked to stop in the middle of it."""
        loader = self._loader(phase)
        if self.state.cursor == 0:
            self.watch.phase_started(phase, self.state)
            self._examine(phase, when="start")
        ends_at = phase.steps * phase.batch_rows
        self.watch.clock.start()
        while self.state.cursor < ends_at:
            batches = loader.step(self.state.cursor)
            tokens, stop, save = self.strategy.sum(
                sum(batch.trained_tokens for batch in batches), self._should_stop(), self._should_save()
            )
            if stop or save:
                self._save()
            if stop:
                loader.close()
                return False
            result = self._train_step(phase, batches, int(tokens))
            self._count(phase, result)
            if self._validate_now() and self._is_exhausted(self._validate(phase, phase_end=False)):
                break
            if self._sample_now():
                self.watch.samples(self.model, self.prepared.tokenizer, self.state)
        loader.close()
        self._end_phase(phase)
        return True

    def _train_step(self, phase: PhaseSection, batches: list[Batch], tokens: int) -> StepResult:
        """One optimizer step on this rank's share of a global batch of `tokens` trained tokens."""
        learning_rate = multiplier(phase.learning_rate, (self.state.cursor + phase.batch_rows) / self._samples(phase))
        self.optimizer.set_learning_rate(learning_rate)
        loss = torch.zeros((), device=self.strategy.device)
        for batch in batches:
            with self.strategy.micro_batch(self.wrapped, last=batch is batches[-1]):
                with self.strategy.autocast():
                    loss_sum, _, _ = self.wrapped(batch.to(self.strategy.device))
                self.strategy.backward(loss_sum, tokens)
            loss += loss_sum.detach()
        grad_norm = self.strategy.clip(self.model, self.config.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, tokens, learning_rate, grad_norm)

    def _count(self, phase: PhaseSection, result: StepResult) -> None:
        """Move the run's state past the step, and record the step if it is due."""
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.cursor += phase.batch_rows
        self.watch.clock.count(result.tokens)
        if self.state.step % self.config.watch.log_every == 0 or self.state.step == 1:
            (loss_sum,) = self.strategy.sum(result.loss_sum)
            self.watch.train_step(phase, self.state, loss_sum / result.tokens, result)

    def _end_phase(self, phase: PhaseSection) -> None:
        self._validate(phase, phase_end=True)
        self._examine(phase, when="end")
        self.watch.samples(self.model, self.prepared.tokenizer, self.state)
        self.watch.phase_ended(phase, self.state)
        self.state.phases_done.append(phase.name)
        self.state.cursor = 0
        self.state.best_val_loss, self.state.validations_without_gain = None, 0
        self._save()
        self.watch.report()

    def _validate(self, phase: PhaseSection, phase_end: bool) -> float:
        """Validation loss of the phase's mixture, recorded; nats a token."""
        with self.watch.clock.paused(self.state):
            limit = self.config.evaluation.final_tokens if phase_end else self.config.evaluation.tokens
            losses = examine.validation(self.objective, self.strategy, self.prepared.sources, phase, limit)
            return self.watch.validation(phase, self.state, losses, phase_end)

    def _examine(self, phase: PhaseSection, when: str) -> None:
        """Ask the phase's probes, on the main process; the others wait."""
        with self.watch.clock.paused(self.state):
            if self.strategy.is_main:
                for name in phase.probes:
                    result = examine.probe(name, self.model, self.prepared.tokenizer, self.strategy, self.config)
                    self.watch.probe(phase, self.state, name, when, result)
                if when == "start" and self.config.evaluation.bigram_floor:
                    self.watch.bigram_floors(phase, examine.bigram_floors(self.prepared, phase, self.model_config))
            self.strategy.barrier()

    def _is_exhausted(self, val_loss: float) -> bool:
        """Whether the phase has gone `patience` validations without gain."""
        settings, state = self.config.evaluation, self.state
        if math.isnan(val_loss):  # no source of the phase has a validation split
            return False
        if state.best_val_loss is None or val_loss < state.best_val_loss - settings.min_gain:
            state.best_val_loss, state.validations_without_gain = val_loss, 0
        else:
            state.validations_without_gain += 1
        exhausted = settings.patience is not None and state.validations_without_gain >= settings.patience
        if exhausted:
            self.watch.event("early_stop", self.state, best_val_loss=state.best_val_loss)
        return exhausted

    def _validate_now(self) -> bool:
        every = self.config.evaluation.every_steps
        at_phase_end = self.state.cursor >= self._samples(self._phase)
        return every is not None and self.state.step % every == 0 and not at_phase_end

    def _sample_now(self) -> bool:
        every = self.config.watch.sample_every
        return every is not None and self.state.step % every == 0

    def _should_stop(self) -> bool:
        return self._stop_requested or self._limit_reached()

    def _limit_reached(self) -> bool:
        limit = self.config.run.stop_after_steps
        return limit is not None and self.state.step >= limit

    def _should_save(self) -> bool:
        if not self.strategy.is_main or self.state.cursor == 0:
            return False  # the main process's clock decides; a phase's beginning was saved as the end of the last one
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        by_step = every is not None and self.state.step % every == 0
        return by_step or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def _save(self) -> None:
        """Write a checkpoint of the state as it stands, on the main process; the others wait."""
        with self.watch.clock.paused(self.state):
            weights = self.strategy.state(self.model)
            if self.strategy.is_main:
                self.watch.checkpoint(self.state)
                checkpoint.save(
                    self.folder / "checkpoints",
                    self.state,
                    model=weights,
                    optimizer={name: tensor.cpu().contiguous() for name, tensor in self.optimizer.tensors().items()},
                    model_config=self.model_config,
                    run_config=as_plain(self.config),
                    tokenizer=self.prepared.tokenizer,
                    keep=self.config.checkpoint.keep,
                )
            self.strategy.barrier()
        self._saved_at = time.monotonic()

    def _restore(self) -> Path | None:
        """Take up the newest checkpoint of this run that verifies, else the weights of `init_from`, if there are any;
        returns the checkpoint that the run goes on from."""
        path, skipped = checkpoints.newest(self.folder / "checkpoints")
        self.skipped, self.changes = skipped, []
        if path is not None:
            self._check_same_run(path)
            self.state = checkpoint.read_state(path)
            self.strategy.load_state(self.model, checkpoint.read_weights(path))
            self.optimizer.load_tensors(checkpoint.read_optimizer(path))
        elif self.config.run.init_from is not None:
            source = checkpoints.locate(self.config.run.init_from)
            there, weights = checkpoints.read_model(source)
            _check_same(source, {"model": there.identity()}, {"model": self.model_config.identity()})
            self.strategy.load_state(self.model, weights)
        return path

    def _check_same_run(self, path: Path) -> None:
        """Refuse a config that would make another run of the checkpoint at `path`; list what else has changed."""
        from tokenizer import Tokenizer

        state, saved = checkpoint.read_state(path), checkpoint.read_run_config(path)
        tokenizers = Tokenizer.load(path / checkpoint.TOKENIZER), self.prepared.tokenizer
        before = {"model": checkpoint.read_model_config(path).identity(), "run": {"seed": state.seed}}
        now = {"model": self.model_config.identity(), "run": {"seed": self.config.run.seed}}
        before["tokenizer fingerprint"], now["tokenizer fingerprint"] = (one.fingerprint for one in tokenizers)
        for config, phases in ((before, saved["phases"]), (now, as_plain(self.config)["phases"])):
            done = len(state.phases_done)
            config["phases"] = [{"name": phase["name"]} for phase in phases[:done]]
            if state.cursor:  # in the middle of a phase, `cursor` counts its samples
                config["phases"] += [{key: phase[key] for key in SAMPLE_ORDER} for phase in phases[done : done + 1]]
        _check_same(path, before, now)
        self.changes = [
            f"{key}: {one!r} before, {other!r} now" + (" (that phase is over)" if _is_over(key, state) else "")
            for key, one, other in differences(saved, as_plain(self.config))
        ]

    def _build_optimizer(self) -> MuonAdamW:
        settings = self.config.optimizer
        use_bf16 = settings.newton_schulz == "bf16" or (
            settings.newton_schulz == "auto" and self.strategy.device.type == "cuda"
        )
        return MuonAdamW(
            self.model.named_parameters(),
            muon_lr=settings.muon_lr,
            adamw_lr=settings.adamw_lr,
            momentum=settings.momentum,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            newton_schulz_dtype=torch.bfloat16 if use_bf16 else torch.float32,
        )

    def _loader(self, phase: PhaseSection) -> PhaseLoader:
        return PhaseLoader(
            self.prepared.sources,
            phase.data,
            context=phase.context,
            seed=self.config.run.seed,
            phase=len(self.state.phases_done),
            batch_rows=phase.batch_rows,
            micro_rows=phase.micro_batch,
            rank=self.strategy.rank,
            world=self.strategy.world,
            pin_memory=self.strategy.device.type == "cuda",
        )

    def _samples(self, phase: PhaseSection) -> int:
        return phase.steps * phase.batch_rows

    def _total_steps(self) -> int:
        """Steps of the whole run: those taken, plus what is left of this phase and the ones to come."""
        left = [phase.steps for phase in self.config.phases[len(self.state.phases_done) :]]
        done = self.state.cursor // self._phase.batch_rows if left else 0
        return self.state.step + sum(left) - done

    def _way_on(self) -> str:
        if self._limit_reached():
            return f"raise or drop run.stop_after_steps={self.config.run.stop_after_steps} to go on from there"
        return "the same command goes on from there"

    def _request_stop(self, number: int, _frame: Any) -> None:
        self._stop_requested = True


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := differences(before, now):
        raise RunMismatch(
            f"{path} holds another run than the config describes; choose another run.name, or set back:\n  "
            + "\n  ".join(f"{key}: {there!r} there, {here!r} in the config" for key, there, here in changed)
        )


def _is_over(key: str, state: checkpoints.RunState) -> bool:
    """Whether a config's key belongs to a phase that is done."""
    section, _, rest = key.partition(".")
    return section == "phases" and int(rest.partition(".")[0]) < len(state.phases_done)


def save_resolved_config(config: RunConfig) -> None:
    """Write the config with every default filled in beside the run's metrics."""
    import yaml

    config.run.path.mkdir(parents=True, exist_ok=True)
    folder.write_file(config.run.path / "config.yaml", yaml.safe_dump(as_plain(config), sort_keys=False))
