"""What a run will need, before anything is allocated: parameters, tokens, steps, FLOPs, memory and disk.

Memory is for one process: weights, gradients and optimizer state by exact count, activations by what the backward pass
of each block keeps. Estimates say so; nothing here measures.
"""

import dataclasses
import math
from itertools import islice
from pathlib import Path
from typing import Any

from data import embedded, sources
from data.settings import SourceSection
from models.config import ModelConfig
from models.kernels.limits import LOGITS_AT_ONCE
from settings import ConfigError, Problem
from storage import inputs
from training.settings import PhaseSection, RunConfig

GIB = 2**30
PROCESS_BYTES = 512 * 2**20  # Python, torch and the libraries, before there is a model; a CUDA context is as large
MOST_STACKED = 2**26  # matrix elements that training/optimizer.py orthogonalises together; read here without torch


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """One phase in numbers."""

    name: str
    context: int
    steps: int
    tokens: int
    flops: int
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in numbers."""

    model: ModelConfig
    phases: list[PhasePlan]
    memory: dict[str, int]  # bytes of one process at the phase that needs most
    disk: dict[str, int]  # bytes
    corpus_tokens: dict[str, int | None]  # by source; None where only preparation can tell

    @property
    def tokens(self) -> int:
        """Of all phases."""
        return sum(phase.tokens for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        return {
            "parameters": self.model.parameters()["total"],
            "parameters_by_part": self.model.parameters(),
            "tokens": self.tokens,
            "flops_per_token": sum(phase.flops for phase in self.phases) // self.tokens,
            "memory_bytes": sum(self.memory.values()),
            "memory_by_part": self.memory,
            "disk_bytes": sum(self.disk.values()),
            "corpus_tokens": self.corpus_tokens,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
        }

    def as_text(self) -> str:
        """A table for people."""
        counts = self.model.parameters()
        ratio = self.tokens / counts["total"]
        lines = [
            f"parameters  {counts['total']:,} (embedding {counts['embedding']:,}, blocks {counts['hidden']:,})",
            f"tokens      {self.tokens:,} ({ratio:.1f} a parameter; Chinchilla's optimum is 20)",
            f"compute     {sum(phase.flops for phase in self.phases):.3g} FLOP",
            f"memory      {sum(self.memory.values()) / GIB:.2f} GiB a process (estimate: "
            + ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.items()) + ")",
            f"disk        {sum(self.disk.values()) / GIB:.2f} GiB (estimate: "
            + ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.disk.items()) + ")",
            "",
            f"{'phase':<16}{'context':>8}{'steps':>9}{'tokens':>16}{'FLOP/token':>16}{'memory GiB':>12}",
        ]  # fmt: skip
        for p in self.phases:
            row = f"{p.name:<16}{p.context:>8}{p.steps:>9}{p.tokens:>16,}{p.flops // p.tokens:>16,}"
            lines.append(f"{row}{p.memory_bytes / GIB:>12.2f}")
        return "\n".join(lines)


def plan(config: RunConfig) -> Plan:
    """The plan of `config`'s run.

    Raises:
        ConfigError: the config names a tokenizer, and the model's vocabulary is smaller.
    """
    model = config.model.config(_tokenizer_entries(config), config.longest_context)
    phases = [_plan_phase(config, model, phase) for phase in config.phases]
    memory = max((memory_bytes(model, config, phase) for phase in config.phases), key=lambda parts: sum(parts.values()))
    corpus = {name: estimated_tokens(source) for name, source in config.data.sources.items()}
    bytes_a_token = 2 if model.vocab_size <= 2**16 else 4
    disk = {
        "checkpoints": _most_checkpoints(config, phases) * (memory["weights"] + memory["optimizer"]),
        "shards": sum(_read_tokens(config, name) if n is None else n for name, n in corpus.items()) * bytes_a_token,
    }
    return Plan(model, phases, memory, disk, corpus)


def _most_checkpoints(config: RunConfig, phases: list[PhasePlan]) -> int:
    """That can be there at once: those that `checkpoint.keep...` names, and one that is being written."""
    keep = config.checkpoint
    milestones = sum(phase.steps for phase in phases) // keep.keep_every_steps if keep.keep_every_steps else 0
    ends = len(phases) - 1 if keep.keep_phase_ends else 0  # the last phase's is among the newest
    return keep.keep + keep.keep_best + ends + milestones + 1


def _read_tokens(config: RunConfig, source: str) -> int:
    """What the run reads of a source whose size only preparation can tell: one that is not read again has as many."""
    shares = [(phase.tokens, phase.data.get(source, 0) / sum(phase.data.values())) for phase in config.phases]
    return int(sum(tokens * share for tokens, share in shares))


def _plan_phase(config: RunConfig, model: ModelConfig, phase: PhaseSection) -> PhasePlan:
    tokens = phase.steps * phase.batch_rows * phase.context
    flops = tokens * model.flops_per_token(phase.context)
    memory = sum(memory_bytes(model, config, phase).values())
    return PhasePlan(phase.name, phase.context, phase.steps, tokens, flops, memory)


def memory_bytes(model: ModelConfig, config: RunConfig, phase: PhaseSection) -> dict[str, int]:
    """Bytes of one process while it trains `phase`, by part: the process itself, fp32 weights, gradients and optimizer
    state (one momentum for Muon's matrices, two moments for the rest), activations kept for the backward pass, one
    chunk of logits with the head's gradient, and what Muon's products need beyond the memory that activations leave."""
    counts = model.parameters()
    rows = min(phase.micro_batch, phase.batch_rows)
    positions = rows * phase.context
    by_muon = counts["hidden"] - model.vectors if config.optimizer.muon_lr is not None else 0
    width = 2 if config.parallel.precision == "bf16" else 4
    per_position = activation_bytes(model, width)
    residuals = model.n_layers * model.d_model * 4
    kept = residuals + per_position if model.gradient_checkpointing else model.n_layers * per_position
    activations = positions * kept
    at_once = LOGITS_AT_ONCE["cpu" if config.parallel.device == "cpu" else "cuda"]
    logits = (4 + width) * min(positions * model.vocab_size, at_once) + 4 * model.vocab_size * model.d_model
    stacked = min(2 * model.n_layers * model.d_model * model.d_ff, max(MOST_STACKED, model.d_model * model.d_ff))
    return {
        "process": PROCESS_BYTES,
        "weights": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": 4 * by_muon + 8 * (counts["total"] - by_muon),
        "activations": activations,
        "logits": logits,
        "muon": max(0, 4 * 4 * stacked - activations - logits) if by_muon else 0,
    }


def activation_bytes(model: ModelConfig, width: int) -> int:
    """Bytes that one block keeps for the backward pass of one position; `width` bytes a matrix product's operand."""
    heads, kv = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    norms = 2 * (4 + width) * model.d_model  # inputs of both, fp32, and outputs as the products read them
    attention = width * (2 * heads + 2 * (2 * kv if model.window else kv) + heads)
    feed_forward = width * (4 if model.feed_forward == "swiglu" else 2) * model.d_ff
    return norms + attention + feed_forward


def estimated_tokens(source: SourceSection) -> int | None:
    """Tokens of a source at a byte-level BPE's usual four bytes a token; None for the Hub, which nobody asks here."""
    kind, rest = sources.parse(source.from_)
    if kind == "embedded":
        made = embedded.talks if source.conversations else embedded.documents
        some = list(islice(made(rest, "train", 20, seed=0), 20))
        there = embedded.size(rest, "train") or math.inf
        return int(sum(len(text) for text in some) / len(some) * min(source.documents or there, there) / 4)
    if kind == "hub":
        return None
    return sum(map(inputs.text_bytes, sources.files(source.from_))) // 4


def _tokenizer_entries(config: RunConfig) -> int:
    section = config.tokenizer
    if section.path is None or section.path.startswith("hub:"):
        return config.model.vocab_size or section.vocab_size
    from tokenizer import Tokenizer

    entries = Tokenizer.load(Path(section.path)).vocab_size
    if config.model.vocab_size is not None and config.model.vocab_size < entries:
        raise ConfigError(
            [Problem("model.vocab_size", config.model.vocab_size, f"use at least the tokenizer's {entries} entries")]
        )
    return entries
