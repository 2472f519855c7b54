"""What the tests of stock formats share: checkpoints of every recipe's shape at a small width, with a tokenizer."""

import dataclasses
import functools
from pathlib import Path

from export import bundle
from export.trained import Trained
from models import ModelConfig
from tests.small_models import PUBLISHED, build_awake, published, shrunk
from tokenizer import Tokenizer

VOCAB = 310  # a few rows more than the tokenizer has entries
RECIPES = (*PUBLISHED, "../config", "tinystories-cpu")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(bundle.GOLDEN_TEXTS.values())], 1024)


@functools.cache
def _published(name: str) -> ModelConfig:
    return published(name)


def recipe(name: str, **changed: object) -> ModelConfig:
    """The shape of configs/NAME.yaml with a small width and vocabulary, and what is `changed` about it."""
    whole = _published(name)
    config = shrunk(whole)
    fourfold = {"d_ff": 4 * config.d_model} if whole.d_ff == 4 * whole.d_model else {}
    return dataclasses.replace(config, **{"vocab_size": VOCAB, **fourfold, **changed})


def trained_as(config: ModelConfig, chats: bool = False) -> Trained:
    """A checkpoint as `export.trained.load` gives it."""
    known = tokenizer()
    end, turn = known.end_of_text, known.token_id("<|end|>")
    never = [1, *range(known.vocab_size, config.vocab_size)]
    model = build_awake(config).requires_grad_(False)
    stops = [end, turn] if chats else [end]
    return Trained(Path("run"), model, known, config, [known.begin_of_text], stops, never, chats)
