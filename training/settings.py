"""The whole run as one typed config: what `config.yaml` may say, and every check that can be made before starting.

Sections that configure another room live there (`data/settings.py`, `tokenizer/settings.py`); the model's section has
the fields of `models.ModelConfig`. This file is read by `--help` and config errors, so it must not import torch.
"""

import dataclasses
import datetime
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from checkpoints import hub
from checkpoints.checkpoint import Retention
from data.order import PERIOD
from data.settings import DataSection
from models.config import ModelConfig
from settings import Problem, Section, in_the_way, kind_of
from tokenizer.settings import TokenizerSection
from training.schedule import ScheduleSection

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RECALL_CONTEXT = 2048  # tokens that the recall probe's documents need

_MODEL_FIELDS: dict[str, Any] = {field.name: (field.type, field.default) for field in dataclasses.fields(ModelConfig)}
_MODEL_FIELDS["vocab_size"] = (int | None, None)  # null: the tokenizer's
_MODEL_FIELDS["context"] = (int | None, None)  # null: the longest phase's


class ModelSection(pydantic.create_model("_ModelFields", __base__=Section, **_MODEL_FIELDS)):
    """The shape of the model: the fields of `models.ModelConfig`, two of which may be left to the run."""

    def config(self, vocab_size: int, context: int) -> ModelConfig:
        """The shape with what was left open filled in."""
        fields = self.model_dump()
        fields["vocab_size"] = fields["vocab_size"] or vocab_size
        fields["context"] = fields["context"] or context
        return ModelConfig(**fields)

    def problems(self) -> list[Problem]:
        filled = {"vocab_size": 1 if self.vocab_size is None else self.vocab_size,
                  "context": 1 if self.context is None else self.context}  # fmt: skip
        return [Problem(*problem) for problem in ModelConfig(**{**self.model_dump(), **filled}).problems()]


def _moment(value: Any) -> datetime.datetime:
    """What is written as a date and a time, in UTC unless it names another offset."""
    try:
        if not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", value)):
            raise ValueError
        moment = datetime.datetime.fromisoformat(value)
        return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise ValueError("write a date and a time in UTC, for example 2026-12-31T18:00Z") from None


Deadline = Annotated[datetime.datetime, pydantic.BeforeValidator(_moment)]


class RunSection(Section):
    """The run's name and where it lives."""

    name: str = "default"  # the run's folder is <folder>/<name>
    folder: str = "runs"
    seed: int = pydantic.Field(1234, ge=0, lt=2**63)  # of weights and data order
    init_from: str | None = None  # run, checkpoint, Hugging Face folder or hub:OWNER/NAME that has the first weights
    # what a resumed run may find changed: the tokenizer (for weights of `init_from` too), the shards, the order of
    # samples, the learning rates
    allow: list[Literal["tokenizer", "data", "order", "schedule"]] = []
    stop_after_steps: int | None = pydantic.Field(None, ge=1)  # save and stop there, to be resumed later
    max_minutes: float | None = pydantic.Field(None, gt=0, le=1e6)  # save and stop after so long, each time anew
    deadline: Deadline | None = None  # save and stop then, however often it was started

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) / self.name

    def problems(self) -> list[Problem]:
        found = []
        if not RUN_NAME.fullmatch(self.name):
            remedy = "it names a folder: use up to 100 letters, digits, . _ and -, a letter or digit first"
            return [Problem("name", self.name, remedy)]
        if (blocking := in_the_way(self.path)) is not None:
            remedy = f"{blocking} is {kind_of(blocking)}: name a folder, which is made when needed, or move it away"
            found.append(Problem("folder", self.folder, remedy))
        else:
            for name, is_folder in (("checkpoints", True), ("metrics.jsonl", False), ("config.yaml", False),
                                    ("outcome.json", False)):  # fmt: skip
                entry = self.path / name
                if os.path.lexists(entry) and not (entry.is_dir() if is_folder else entry.is_file()):
                    wanted = "a folder" if is_folder else "a file"
                    remedy = f"{entry} is {kind_of(entry)}, where a run keeps {wanted}: move it away"
                    found.append(Problem("name", self.name, remedy))
        begun = (self.path / "checkpoints").is_dir()  # then `init_from` has done its work, and may be gone
        if self.init_from is not None and not begun:
            if hub.is_name(self.init_from):  # its presence is not checked here: validation needs no network
                if not hub.is_well_formed(self.init_from):
                    found.append(Problem("init_from", self.init_from, f"write a model of the Hub as {hub.FORM}"))
            elif not Path(self.init_from).is_dir():
                remedy = f"name the folder of an existing run or checkpoint, or {hub.FORM}"
                found.append(Problem("init_from", self.init_from, remedy))
        return found


class ParallelSection(Section):
    """Processes, precision and compilation."""

    processes: int | Literal["auto"] = "auto"  # expected; auto: one a GPU, on CPU what the launcher started
    strategy: Literal["auto", "plain", "ddp"] = "auto"  # auto: ddp when there are several processes
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: bf16 on CUDA
    compile: bool = False  # torch.compile, on every rank
    cpu_threads: int | None = pydantic.Field(None, ge=1, le=1024)  # a process; null: all cores, shared
    launch_minutes: float = pydantic.Field(10.0, gt=0, le=1e5)  # ranks wait so long for all of them to start
    timeout_minutes: float = pydantic.Field(60.0, gt=0, le=1e5)  # and so long for each other in training

    def problems(self) -> list[Problem]:
        if isinstance(self.processes, int) and self.processes < 1:
            return [Problem("processes", self.processes, "use 1 or more, or auto")]
        if self.strategy == "plain" and self.processes not in ("auto", 1):
            return [Problem("strategy", self.strategy, f"use ddp or auto for {self.processes} processes")]
        return []


class OptimizerSection(Section):
    """Muon for hidden matrices, AdamW for embeddings and norms."""

    muon_lr: float | None = pydantic.Field(0.02, gt=0)  # peak; each phase's schedule scales it; null: AdamW throughout
    adamw_lr: float = pydantic.Field(3e-3, gt=0)  # peak
    momentum: float = pydantic.Field(0.95, ge=0, lt=1)  # of Muon
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = pydantic.Field(0.0, ge=0)  # decoupled, on matrices
    clip: float | None = pydantic.Field(1.0, gt=0)  # global gradient norm; null: no clipping
    most_skipped: int = pydantic.Field(10, ge=1)  # batches in a row without a finite gradient, then training gives up
    newton_schulz: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA

    def problems(self) -> list[Problem]:
        if not all(0 <= beta < 1 for beta in self.betas):
            return [Problem("betas", list(self.betas), "use two numbers from 0 up to, not including, 1")]
        return []


class LessonSection(Section):
    """How a phase learns from a teacher's scores (`python -m distill.score`), where its sources have them."""

    alpha: float = pydantic.Field(0.5, ge=0, le=1)  # weight of the cross-entropy at scored tokens; KL has the rest
    teacher: str | None = None  # of several, hub:OWNER/NAME or the first letters of its weights' digest


class PhaseSection(Section):
    """One stage of the curriculum."""

    name: str = pydantic.Field(min_length=1)
    context: int = pydantic.Field(ge=2)  # positions a sample
    data: dict[str, float] = pydantic.Field(min_length=1)  # share of samples by source name, any scale
    tokens: int = pydantic.Field(ge=1)  # positions trained in this phase
    batch_tokens: int = pydantic.Field(ge=1)  # positions of one optimizer step, over all processes
    micro_batch: int = pydantic.Field(8, ge=1)  # samples of one forward pass of one process, at most
    learning_rate: ScheduleSection = ScheduleSection()
    distill: LessonSection | None = None  # null: nothing but the text is learned
    probes: list[Literal["word_problems", "recall"]] = []  # asked before and after the phase

    @property
    def batch_rows(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Optimizer steps of the phase."""
        return max(1, round(self.tokens / (self.batch_rows * self.context)))

    def problems(self) -> list[Problem]:
        found = []
        if self.batch_tokens % self.context:
            lower = self.batch_tokens - self.batch_tokens % self.context
            nearest = " or ".join(str(n) for n in (lower, lower + self.context) if n)
            remedy = f"use a multiple of the phase's context ({self.context}): {nearest}"
            found.append(Problem("batch_tokens", self.batch_tokens, remedy))
        if self.tokens < self.batch_tokens:
            found.append(Problem("tokens", self.tokens, f"use at least one batch ({self.batch_tokens} tokens)"))
        total = sum(weight for weight in self.data.values() if 0 < weight <= 1e9)
        for name, weight in self.data.items():
            if not 0 < weight <= 1e9:
                remedy = "give a share above 0, up to 1e9, or leave the source out"
                found.append(Problem(f"data.{name}", weight, remedy))
            elif weight * PERIOD < total:  # less than one sample a period would be none at all
                least = math.ceil((total - weight) / (PERIOD - 1) * 1e6) / 1e6
                remedy = f"give at least {least:.10g}, a share of 1/{PERIOD}, or leave the source out"
                found.append(Problem(f"data.{name}", weight, remedy))
        return found


class CheckpointSection(Section):
    """When the run is saved. The end of a phase always is."""

    every_steps: int | None = pydantic.Field(None, ge=1)
    every_minutes: float | None = pydantic.Field(10.0, gt=0)
    keep: int = pydantic.Field(3, ge=1)  # newest checkpoints kept
    keep_best: bool = True  # and the one with the lowest validation loss of its phase
    keep_phase_ends: bool = True  # and those at the end of a phase
    keep_every_steps: int | None = pydantic.Field(None, ge=1)  # and those of every so many steps; null: none

    @property
    def retention(self) -> Retention:
        """What the checkpoints' room makes of it."""
        return Retention(self.keep, self.keep_best, self.keep_phase_ends, self.keep_every_steps)


class EvaluationSection(Section):
    """Validation loss, early stopping, and how much a phase's probes ask."""

    every_steps: int | None = pydantic.Field(100, ge=1)  # null: at phase ends only
    tokens: int = pydantic.Field(50_000, ge=1)  # of each source's validation split, during a phase
    final_tokens: int | None = pydantic.Field(None, ge=1)  # the same at a phase's end; null: the whole split
    patience: int | None = pydantic.Field(None, ge=1)  # end a phase after so many validations without gain
    min_gain: float = pydantic.Field(0.0, ge=0)  # nats that count as gain
    word_problems: int = pydantic.Field(200, ge=1, le=400)  # held-out problems a probe asks
    recall: int = pydantic.Field(50, ge=1, le=5000)  # held-out long documents a probe asks about
    bigram_floor: bool = True  # state the loss of a Kneser-Ney bigram model on the same text beside the run's


class WatchSection(Section):
    """What can be seen of the run."""

    log_every: int = pydantic.Field(10, ge=1)  # steps between lines of metrics.jsonl
    wandb: Literal["auto", "off"] = "auto"  # auto: online with a key, offline without
    sample_every: int | None = pydantic.Field(None, ge=1)  # steps; phase ends always write a sample
    sample_tokens: int = pydantic.Field(120, ge=1)
    sample_prompts: list[str] = ["Once upon a time"]


class RunConfig(Section):
    """Everything a run is made of."""

    run: RunSection = RunSection()
    parallel: ParallelSection = ParallelSection()
    model: ModelSection = ModelSection()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    phases: list[PhaseSection] = pydantic.Field(min_length=1)
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    watch: WatchSection = WatchSection()

    @property
    def longest_context(self) -> int:
        """Of all phases."""
        return max(phase.context for phase in self.phases)

    def problems(self) -> list[Problem]:
        found = []
        names = Counter(phase.name for phase in self.phases)
        for index, phase in enumerate(self.phases):
            if names[phase.name] > 1:
                found.append(Problem(f"phases.{index}.name", phase.name, "give each phase a name of its own"))
            for source in phase.data:
                if self.data.sources and source not in self.data.sources:  # that there are none is said elsewhere
                    known = ", ".join(sorted(self.data.sources))
                    remedy = f"name a source of data.sources (there are: {known})"
                    found.append(Problem(f"phases.{index}.data.{source}", source, remedy))
            if "recall" in phase.probes and (self.model.context or self.longest_context) < RECALL_CONTEXT:
                remedy = f"leave recall out, or let model.context be {RECALL_CONTEXT}: its documents are that long"
                found.append(Problem(f"phases.{index}.probes", phase.probes, remedy))
            if self.model.context is not None and phase.context > self.model.context:
                remedy = f"use at most model.context ({self.model.context})"
                found.append(Problem(f"phases.{index}.context", phase.context, remedy))
            if isinstance(self.parallel.processes, int) and 0 < phase.batch_rows < self.parallel.processes:
                remedy = f"use at least {self.parallel.processes * phase.context}: one sample a process"
                found.append(Problem(f"phases.{index}.batch_tokens", phase.batch_tokens, remedy))
        return found
