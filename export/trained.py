"""What is exported: a trained model with its tokenizer, and what every client must know of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model as formats read it.

    Attributes:
        path: the folder that it was read from.
        model: in evaluation mode, fp32, on the CPU.
        begin: what stands before the first token of a text.
        stops: tokens at which a client ends: the end of text, and of a model that chats the end of a turn.
        never: tokens that are never drawn: those that no training document held, and rows that only pad the vocabulary.
        chats: whether it was taught conversations.
    """

    path: Path
    model: "nn.Module"
    tokenizer: "Tokenizer"
    config: ModelConfig
    begin: list[int]
    stops: list[int]
    never: list[int]
    chats: bool

    @property
    def drawn(self) -> list[int]:
        """All other tokens: those whose logits mean something."""
        return sorted(set(range(self.config.vocab_size)) - set(self.never))

    @property
    def largest_window(self) -> int:
        """Of all layers; 0 where none has a window."""
        return max(self.config.layer_window(layer) or 0 for layer in range(self.config.n_layers))

    @property
    def name(self) -> str:
        """What to call it: the run, or the folder that holds the model."""
        path = self.path.resolve()
        return path.parent.parent.name if path.parent.name == "checkpoints" else path.name

    @property
    def end(self) -> int:
        """The one token at which clients end that know only one: of a model that chats, the end of a turn."""
        ends = [token for token in self.stops if token != self.tokenizer.end_of_text]
        return ends[0] if self.chats and ends else self.tokenizer.end_of_text


def load(checkpoint: str | Path, context: int | None = None) -> Trained:
    """The model at `checkpoint`: anything that `generate.py` takes.

    Args:
        context: the longest text that is wanted, tokens; at most the model's own.

    Raises:
        CheckpointError: there is no model, or it does not verify.
    """
    from checkpoints import CheckpointError, load_model, locate, never_drawn, stop_ids, text_start

    path = locate(checkpoint)
    model, tokenizer, config = load_model(path, context=context, located=True)
    model.requires_grad_(False)
    wrong = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} holds numbers that are not finite: name an earlier checkpoint")
    stops, never = set(stop_ids(path, tokenizer)), set(never_drawn(path, tokenizer))
    turn = _end_of_turn(tokenizer)
    chats = turn is not None and turn not in never  # that no training document held: nobody taught it conversations
    if chats:
        stops.add(turn)
    padding = range(tokenizer.vocab_size, config.vocab_size)
    return Trained(
        path, model, tokenizer, config, text_start(path, tokenizer), sorted(stops), sorted({*never, *padding} - stops),
        chats,
    )  # fmt: skip


def _end_of_turn(tokenizer: "Tokenizer") -> int | None:
    """The token that ends what an assistant says; None where the tokenizer writes no conversations."""
    from tokenizer import TokenizerError
    from tokenizer.conversations import ChatFormat

    try:
        return ChatFormat(tokenizer).end_of_turn
    except TokenizerError:
        return None
