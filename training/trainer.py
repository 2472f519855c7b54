"""The loop: a run is a list of phases, a phase is a list of steps, and everything in between can be taken up again.

`Trainer.run` reads from top to bottom: resume or start, then for each phase train, validate, save; `_train_step` is
the one train step of the project. What a step does depends only on (config, seed, RunState), never on the number of
processes; see data/loader.py for the order of samples and training/schedule.py for the learning rate.
"""

import contextlib
import dataclasses
import enum
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import checkpoints
from checkpoints import checkpoint
from data import shards
from data.loader import Batch, PhaseLoader
from data.prepare import Prepared
from machine import process
from models import build_model
from models.kernels.attention import choose_kernel
from settings import as_plain
from storage import folder
from training import examine, resume
from training.objectives import NextToken
from training.optimizer import MuonAdamW
from training.parallel import LaunchError, Strategy
from training.requests import Requests, Stopped
from training.schedule import multiplier
from training.settings import PhaseSection, RunConfig
from training.stability import Diverged, StepLog
from training.step_result import StepResult
from training.watch import Watch

T = TypeVar("T")
LARGE_FOR_A_CPU = 8_000_000  # parameters, from which memory matters more than the last tenth of the speed


class Outcome(enum.Enum):
    """How a run came to its end; the value is the process's exit code."""

    FINISHED = 0
    STOPPED = 75  # saved, and the same command goes on from there (EX_TEMPFAIL)


class Trainer:
    """One run on this process. All ranks build the same.

    Args:
        scores: by phase that distills, folders of a teacher's scores by source.
    """

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        prepared: Prepared,
        requests: Requests,
        scores: Mapping[str, Mapping[str, Path]],
    ):
        self.config, self.strategy, self.prepared, self.requests = config, strategy, prepared, requests
        self.scores = scores
        self.folder: Path = config.run.path
        self.state = checkpoints.RunState(seed=config.run.seed)
        self.model_config = config.model.config(prepared.tokenizer.vocab_size, config.longest_context)
        if strategy.device.type == "cpu" and self.model_config.parameters()["total"] >= LARGE_FOR_A_CPU:
            process.return_memory()
        self.model = build_model(self.model_config, config.run.seed)
        self.objective = NextToken(self.model)
        self.wrapped = strategy.prepare(self.objective)
        self.optimizer = MuonAdamW.of(self.model, config.optimizer)
        resumed = self._restore()
        self.total_steps = self._total_steps()
        self.watch = Watch(config, strategy, self.model_config, self.total_steps, resumed, self.state)
        kernel = choose_kernel(strategy.device, self.model_config.d_head, strategy.dtype)
        self.watch.say(f"attention: {kernel.name} ({kernel.reason})")
        self._unread = StepLog(strategy)
        self._saved_at = time.monotonic()

    def run(self) -> Outcome:
        """Train all phases that are left.

        Raises:
            Diverged: too many batches in a row had a loss or gradient that is no number.
        """
        try:
            while len(self.state.phases_done) < len(self.config.phases):
                self._run_phase(self._phase)
        except Stopped:
            if not self.state.ends_phase:  # that is saved
                self._save()
            self.watch.event("stopped", self.state, reason=self.requests.told)
            self.watch.close(f"stopped at step {self.state.step}: {self.why_stopped()[1]}")
            return Outcome.STOPPED
        self.watch.close(f"finished: {self.state.step} steps, {self.state.tokens:,} tokens")
        return Outcome.FINISHED

    @property
    def _phase(self) -> PhaseSection:
        """The current phase."""
        return self.config.phases[len(self.state.phases_done)]

    def _run_phase(self, phase: PhaseSection) -> None:
        """One phase from where it stands. Raises Stopped where all ranks agree to stop."""
        self.state.special_tokens = self._special_tokens()
        self.objective.alpha = phase.distill.alpha if phase.distill else 1.0
        if self.state.cursor == 0:
            with self._whole_or_not():
                self.state.val_loss = None
                self.watch.phase_started(phase, self.state)
                if phase.batch_rows < self.strategy.world:
                    self.watch.say(f"phase {phase.name} has fewer rows a step, {phase.batch_rows}, than processes, "
                                   f"{self.strategy.world}, so some wait: raise its batch_tokens")  # fmt: skip
                self._examine(phase, when="start")
        self.watch.clock.start()
        with contextlib.closing(self._loader(phase)) as loader:
            for name, left_out in loader.left_out().items():
                self.watch.say(f"{name}: {left_out:,} conversations are longer than the context of phase {phase.name}, "
                               f"{phase.context} tokens, and left out")  # fmt: skip
            while self.state.cursor < self._samples(phase):
                self._look_up(phase)
                if self._is_exhausted():
                    break
                batches = loader.step(self.state.cursor)
                tokens, read, stop, save = self.strategy.sum(
                    sum(batch.trained_tokens for batch in batches), sum(batch.read_tokens for batch in batches),
                    self._should_stop(), self._should_save(),
                )  # fmt: skip
                if stop:
                    raise Stopped
                if save:
                    self._save()
                self._count(phase, self._train_step(phase, batches, int(tokens), int(read)))
        self._end_phase(phase)

    def _train_step(self, phase: PhaseSection, batches: list[Batch], tokens: int, read: int) -> StepResult:
        """One optimizer step on this rank's share of a global batch of `tokens` trained tokens among `read` ones."""
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
        self.optimizer.step(only_if=grad_norm.isfinite())
        self.optimizer.zero_grad()
        return StepResult(loss, tokens, read, learning_rate, grad_norm)

    def _count(self, phase: PhaseSection, result: StepResult) -> None:
        """Move the run's state past the step, and record the step if it is due."""
        first_sample = self.state.cursor
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.cursor += phase.batch_rows
        self.watch.clock.count(result.read)
        self._unread.append(self.state.step, range(first_sample, self.state.cursor), result)
        is_last = self.state.cursor >= self._samples(phase)
        is_due = self.state.step % self.config.watch.log_every == 0 or self.state.step == 1 or is_last
        if is_due or self._unread.is_long:
            loss = self._read_steps(phase)
        if is_due:
            self.watch.train_step(phase, self.state, loss, result)

    def _read_steps(self, phase: PhaseSection) -> float:
        """Look at what the last steps gave: count the skipped ones, notice leaps; returns the last one's loss."""
        loss = math.nan
        for seen in self._unread.read(self.state):
            loss = seen.loss
            if seen.event:
                self.watch.event(seen.event, self.state, **seen.details())
            if self.state.skipped_in_a_row >= self.config.optimizer.most_skipped:
                self.watch.event("diverged", self.state, at=seen.step)
                raise Diverged(self.state, seen.step, phase.name, self.config.optimizer.most_skipped)
        return loss

    def _look_up(self, phase: PhaseSection) -> None:
        """Validate and sample if that is due after the step just taken and was not done then."""
        step = self.state.step
        if self.state.cursor == 0 or self.state.looked_up == step:
            return
        validates = _is_due(self.config.evaluation.every_steps, step)
        samples = _is_due(self.config.watch.sample_every, step)
        with self._whole_or_not() if validates or samples else contextlib.nullcontext():  # which waits for the step
            if validates:
                self._note_gain(self._validate(phase, phase_end=False))
            if samples:
                self._sample()
            self.state.looked_up = step

    def _end_phase(self, phase: PhaseSection) -> None:
        with self._whole_or_not():
            self._validate(phase, phase_end=True)
            self._examine(phase, when="end")
            self._sample()
            self.watch.phase_ended(phase, self.state)
            self.state.phases_done.append(phase.name)
            self.state.samples_done[phase.name] = self.state.cursor
            self.state.cursor = 0
            self.state.best_val_loss, self.state.validations_without_gain = None, 0
            self.state.loss_count = 0
        self._save()
        self.watch.report()

    @contextlib.contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """Around what goes with one step: if it is cut short by a request to stop, neither the run's state nor its
        records keep a part of it, and the resumed run does it again."""
        if self._unread:
            self._read_steps(self._phase)
        before = dataclasses.replace(self.state)
        place = self.watch.place_in_metrics()
        try:
            yield
        except Stopped:
            self.state = dataclasses.replace(before, seconds=self.state.seconds)
            self.watch.forget_since(place)
            raise

    def _unless_stopped(self, things: Iterable[T]) -> Iterator[T]:
        """`things`, the same number on every rank, until all ranks know that one of them is asked to stop."""
        for thing in things:
            (stop,) = self.strategy.sum(self.requests.stop)
            if stop:
                raise Stopped
            yield thing

    @contextlib.contextmanager
    def _on_main(self) -> Iterator[None]:
        """Around what the main process does alone; the others wait for it. All stop if it is stopped."""
        stopped = False
        try:
            yield
        except Stopped:
            stopped = True
        if self.strategy.sum(stopped)[0]:
            raise Stopped

    def _go_on(self, *_: Any) -> None:
        """Called now and then by what the main process does alone."""
        if self.requests.stop:
            raise Stopped

    def _validate(self, phase: PhaseSection, phase_end: bool) -> float:
        """Validation loss of the phase's mixture, recorded; nats a token."""
        with self.watch.clock.paused(self.state):
            limit = self.config.evaluation.final_tokens if phase_end else self.config.evaluation.tokens
            losses = examine.validation(
                self.objective, self.strategy, self.prepared.sources, phase, limit, self._unless_stopped,
                self._scores(phase),
            )  # fmt: skip
            val_loss = self.watch.validation(phase, self.state, losses, phase_end)
            self.state.val_loss = None if math.isnan(val_loss) else val_loss
            return val_loss

    def _examine(self, phase: PhaseSection, when: str) -> None:
        """Ask the phase's probes, on the main process."""
        with self.watch.clock.paused(self.state), self._on_main():
            if self.strategy.is_main:
                for name in phase.probes:
                    self._go_on()
                    result = examine.probe(
                        name, self.model, self.prepared.tokenizer, self.strategy, self.config, self._never_drawn(),
                        self._go_on,
                    )  # fmt: skip
                    self.watch.probe(phase, self.state, name, when, result)
                if when == "start" and self.config.evaluation.bigram_floor:
                    self.watch.bigram_floors(phase, examine.bigram_floors(self.prepared, phase, self.model_config))

    def _sample(self) -> None:
        """Let the model continue the prompts, on the main process."""
        with self.watch.clock.paused(self.state), self._on_main():
            if self.strategy.is_main:
                self.watch.samples(
                    self.model, self.prepared.tokenizer, self.state, self._never_drawn(), self._go_on
                )

    def _never_drawn(self) -> list[int]:
        """The special tokens that no training document held so far."""
        special = self.prepared.tokenizer.special_tokens.values()
        return [token for token in special if token not in self.state.special_tokens]

    def _note_gain(self, val_loss: float) -> None:
        """Keep count of the validations that brought nothing."""
        settings, state = self.config.evaluation, self.state
        if math.isnan(val_loss):  # no source of the phase has a validation split
            return
        if state.best_val_loss is None or val_loss < state.best_val_loss - settings.min_gain:
            state.best_val_loss, state.validations_without_gain = val_loss, 0
        else:
            state.validations_without_gain += 1
        if self._is_exhausted():
            self.watch.event("early_stop", state, best_val_loss=state.best_val_loss)

    def _is_exhausted(self) -> bool:
        """Whether the phase has gone `patience` validations without gain."""
        patience = self.config.evaluation.patience
        return patience is not None and self.state.validations_without_gain >= patience

    def _should_stop(self) -> bool:
        return self.requests.stop or self._limit_reached()

    def _limit_reached(self) -> bool:
        limit = self.config.run.stop_after_steps
        return limit is not None and self.state.step >= limit

    def _should_save(self) -> bool:
        if self.requests.save:  # whichever process was asked
            return True
        if not self.strategy.is_main or self.state.cursor == 0:
            return False  # the main process's clock decides; a phase's beginning was saved as the end of the last one
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        by_step = every is not None and self.state.step % every == 0
        return by_step or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def _save(self) -> None:
        """Write a checkpoint of the state as it stands, on the main process; the others wait."""
        if self._unread:
            self._read_steps(self._phase)
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
                    retention=self.config.checkpoint.retention,
                )
            self.strategy.barrier()
        self.requests.saved()
        self._saved_at = time.monotonic()

    def _restore(self) -> Path | None:
        """Take up the newest checkpoint of this run that verifies, else the weights of `init_from`, if there are any;
        returns the checkpoint that the run goes on from. The main process looks for it; all take up the same one.

        Raises:
            LaunchError: a process does not see the checkpoint.
        """
        found = checkpoints.take_stock(self.folder / "checkpoints") if self.strategy.is_main else None
        path, skipped = self.strategy.from_main(found)
        (unseen,) = self.strategy.sum(path is not None and not path.is_dir())
        if unseen:
            raise LaunchError(f"{unseen:.0f} of {self.strategy.world} processes do not see {path}: give all machines "
                              "the same run.folder, on a disk that they share")  # fmt: skip
        self.skipped, self.changes = skipped, []
        if path is not None:
            self.state, self.changes = resume.take_up(path, self.config, self.model_config, self.prepared, self.scores)
            self.strategy.load_state(self.model, checkpoint.read_weights(path))
            self.optimizer.load_tensors(checkpoint.read_optimizer(path))
        elif self.config.run.init_from is not None:
            source = checkpoints.locate(self.config.run.init_from, only_cached=True)  # see training/start.py
            there, weights = checkpoints.read_model(source)
            resume.check_same_model(source, there, self.model_config)
            resume.check_same_tokenizer(source, self.prepared.tokenizer, self.config)
            self.strategy.load_state(self.model, weights)
            self.state.special_tokens = resume.special_tokens(source, self.prepared.tokenizer)
        self.state.seed, self.state.data = self.config.run.seed, resume.digests(self.prepared, self.scores)
        return path

    def _special_tokens(self) -> list[int]:
        """What RunState records of them: those that the weights began with, and those of all phases up to this one. The
        main process looks, as shards that an older version made are read for it."""
        found = None
        if self.strategy.is_main:
            special = self.prepared.tokenizer.special_tokens.values()
            names = {name for phase in self.config.phases[: len(self.state.phases_done) + 1] for name in phase.data}
            held = [shards.special_tokens(self.prepared.sources[name], self.prepared.describe(name), special)
                    for name in names]  # fmt: skip
            found = sorted(set(self.state.special_tokens or ()).union(*held))
        return self.strategy.from_main(found)

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
            scores=self._scores(phase),
        )

    def _scores(self, phase: PhaseSection) -> Mapping[str, Path]:
        """By source of the phase, the folder of its scores."""
        return self.scores.get(phase.name, {})

    def _samples(self, phase: PhaseSection) -> int:
        return phase.steps * phase.batch_rows

    def _total_steps(self) -> int:
        """Steps of the whole run: those taken, plus what is left of this phase and the ones to come."""
        left = [phase.steps for phase in self.config.phases[len(self.state.phases_done) :]]
        done = min(self.state.cursor // self._phase.batch_rows, left[0]) if left else 0
        return self.state.step + sum(left) - done

    def why_stopped(self) -> tuple[str, str]:
        """Of a run that was stopped: the reason as in training/outcome.py, and for people what goes on from there."""
        if self._limit_reached():
            limit = f"run.stop_after_steps={self.config.run.stop_after_steps}"
            return "run.stop_after_steps", f"raise or drop {limit} to go on from there"
        return self.requests.reason or "request", self.requests.way_on


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def save_resolved_config(config: RunConfig) -> None:
    """Write the config with every default filled in beside the run's metrics."""
    import yaml

    config.run.path.mkdir(parents=True, exist_ok=True)
    folder.write_file(config.run.path / "config.yaml", yaml.safe_dump(as_plain(config), sort_keys=False))
