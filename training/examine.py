"""What the trainer asks of `evaluation/` during a run: validation losses, probes, and the bigram floor."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from data.loader import Batch, validation_batches
from data.prepare import Prepared
from data.token_shards import TokenShards
from evaluation.bigram import kneser_ney_loss
from evaluation.perplexity import HeldOutLoss, held_out_loss
from models.config import ModelConfig
from training.parallel import Strategy
from training.settings import PhaseSection, RunConfig

if TYPE_CHECKING:
    from evaluation.probes import ProbeResult
    from tokenizer import Tokenizer

MOST_BIGRAM_TOKENS = 20_000_000  # of each source and split: counting more takes longer than it tells


def validation(
    objective: nn.Module,
    strategy: Strategy,
    sources: Mapping[str, Path],
    phase: PhaseSection,
    limit: int | None,
    unless_stopped: Callable[[Iterable[Batch]], Iterable[Batch]],
    scores: Mapping[str, Path],
) -> dict[str, HeldOutLoss]:
    """The held-out loss of each of the phase's sources that has a validation split, on at most `limit` tokens; with
    the divergence from the teacher where `scores` has a folder for a source.

    `unless_stopped` passes the batches through and may raise between two of them.
    """
    losses = {}
    for name in phase.data:
        held_out = TokenShards(sources[name], "valid")
        if not held_out.trained_tokens:
            continue
        rows = min(phase.micro_batch, phase.batch_rows)  # `micro_batch` may be any number above what is there
        batches = validation_batches(
            sources[name], phase.context, rows, limit, strategy.rank, strategy.world, scores.get(name)
        )
        losses[name] = held_out_loss(
            objective,
            unless_stopped(batches),
            tokens_per_byte=held_out.trained_tokens_per_byte,
            device=strategy.device,
            autocast=strategy.autocast(),
            total=strategy.sum,
        )
    return losses


def probe(
    name: str,
    model: nn.Module,
    tokenizer: "Tokenizer",
    strategy: Strategy,
    config: RunConfig,
    never: list[int],
    between: Callable[[], None],
) -> "ProbeResult":
    """Ask held-out questions of the embedded corpus; what is `never` drawn is no answer, and `between` is called now
    and then, and may raise."""
    from evaluation import probes

    ask = {"word_problems": functools.partial(probes.word_problems, never=never), "recall": probes.recall}[name]
    with strategy.autocast():
        return ask(model, tokenizer, seed=config.data.seed, count=getattr(config.evaluation, name), between=between)


def recall_fault(config: RunConfig, prepared: Prepared, context: int) -> str | None:
    """Why the recall probe could not be asked of a model with this context and tokenizer; None if it can."""
    from evaluation import probes

    try:
        probes.check_recall(prepared.tokenizer, seed=config.data.seed, context=context)
    except ValueError as error:
        return str(error)
    return None


def bigram_floors(prepared: Prepared, phase: PhaseSection, model_config: ModelConfig) -> dict[str, float]:
    """By source, the validation loss of a Kneser-Ney bigram model that counted the phase's training text; of each
    source and split the first MOST_BIGRAM_TOKENS. Conversations have none: the model is not asked for all of theirs."""
    plain = [name for name in phase.data if TokenShards(prepared.sources[name], "train").masks is None]
    train = [part for name in plain for part in _first_tokens(prepared.sources[name], "train")]
    floors = {}
    for name in plain:
        valid = _first_tokens(prepared.sources[name], "valid")
        if valid and len(valid[0]) > 1:
            floors[name] = kneser_ney_loss(train, np.concatenate(valid), model_config.vocab_size)
    return floors


def _first_tokens(folder: Path, split: str) -> list[np.ndarray]:
    left, found = MOST_BIGRAM_TOKENS, []
    for stream in TokenShards(folder, split).tokens:
        found.append(np.asarray(stream[:left]))
        left -= len(found[-1])
    return found
