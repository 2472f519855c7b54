"""A model from whatever holds one: a run's folder, one of its checkpoints, or a stock Hugging Face model, in a folder
or on the Hub."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import checkpoint, hub, huggingface, tensors
from checkpoints.checkpoint import CheckpointError
from models.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tokenizer import Tokenizer


def locate(path: str | Path, only_cached: bool = False) -> Path:
    """The folder that `path` means: a Hugging Face model's, a checkpoint, or the newest verified one of a run.
    "hub:OWNER/NAME" is downloaded, unless it is `only_cached`: where another process has just done so.

    Raises:
        CheckpointError: there is none, or it does not verify.
    """
    if hub.is_name(path):
        return hub.download(path, only_cached)
    return Path(path) if huggingface.is_folder(path) else checkpoint.resolve(path)


def read_shape(path: Path) -> ModelConfig:
    """The shape alone of the model in a folder that `locate` gave."""
    return huggingface.read_shape(path) if huggingface.is_folder(path) else checkpoint.read_model_config(path)


def read_model(
    path: Path, device: str = "cpu", dtype: "torch.dtype | None" = None
) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """Shape and weights of the model in a folder that `locate` gave: on `device`, in `dtype` (None: fp32), but norms
    are fp32."""
    if huggingface.is_folder(path):
        return huggingface.read(path, device, dtype)
    return checkpoint.read_model_config(path), checkpoint.read_weights(path, tensors.placing(device, dtype))


def tokenizer_of(path: Path) -> Path:
    """Where the tokenizer lies that belongs to the model in a folder that `locate` gave."""
    return path if huggingface.is_folder(path) else path / checkpoint.TOKENIZER


def text_start(path: str | Path, tokenizer: "Tokenizer") -> list[int]:
    """What stands before the first token of a text for the model at `path`: the token that its tokenizer declares.
    Where it declares none, ours learn that a text begins after the end of another one, stock models know a text's first
    token as its first."""
    return [] if _is_stock(path) and not tokenizer.declares_begin else [tokenizer.begin_of_text]


def stop_ids(path: str | Path, tokenizer: "Tokenizer") -> list[int]:
    """The tokens that end what the model at `path` writes: the end of text, and what a stock folder names besides. A
    model of the Hub has to be there: ask after `load_model`.

    Raises:
        CheckpointError: the folder's generation_config.json or config.json names them in no way that there is.
    """
    named = huggingface.end_ids(locate(path, only_cached=True)) if _is_stock(path) else []
    there = {token for token in named if 0 <= token < tokenizer.vocab_size}  # no other can be drawn
    return sorted({tokenizer.end_of_text, *there})


def never_drawn(path: Path, tokenizer: "Tokenizer") -> list[int]:
    """The special tokens that the model in a folder that `locate` gave has never seen, so that what it makes of them is
    an accident: those that no training document held, as its checkpoint records; where nothing is recorded, all but
    those that end a text or an answer, and of these what a stock folder says is never drawn.

    Raises:
        CheckpointError: the checkpoint's state.json cannot be read.
    """
    special = set(tokenizer.special_tokens.values())
    held = None if _is_stock(path) else checkpoint.read_state(path).special_tokens
    never = special - (_ends(path, tokenizer) if held is None else set(held))
    return sorted(never | (special & set(huggingface.suppressed_ids(path)) if _is_stock(path) else set()))


def _ends(path: Path, tokenizer: "Tokenizer") -> set[int]:
    """All tokens that end what the model in a folder that `locate` gave says, answers in a conversation too."""
    from tokenizer import TokenizerError
    from tokenizer.conversations import ChatFormat

    ends = set(stop_ids(path, tokenizer))
    try:
        return ends | set(ChatFormat(tokenizer).stop_ids)
    except TokenizerError:  # it holds no conversations
        return ends


def _is_stock(path: str | Path) -> bool:
    return hub.is_name(path) or huggingface.is_folder(path)


def load_model(
    path: str | Path, device: str = "cpu", *, context: int | None = None, dtype: "torch.dtype | None" = None,
    located: bool = False,
) -> tuple["nn.Module", "Tokenizer", ModelConfig]:  # fmt: skip
    """The model in evaluation mode, its tokenizer and its config, from anything that `locate` finds.

    Args:
        context: the longest sequence that is wanted, tokens: tables and caches are made for it. A model whose own
            context is shorter keeps that.
        dtype: of the weights (None: fp32), as they are read, one after the other, to the device: a whole copy in
            another type never exists. Norms stay fp32, as in models.inference.ready.for_decoding.
        located: `path` is what `locate` has just given, so it is not verified once more.

    Raises:
        CheckpointError: there is no model, or it does not verify.
    """
    from models import build_model
    from tokenizer import Tokenizer, TokenizerError

    path = Path(path) if located else locate(path)
    config, weights = read_model(path, device, dtype)
    try:
        tokenizer = Tokenizer.load(tokenizer_of(path))
        if context is not None and context < config.context:
            config, weights = _shortened(config, weights, context)
        model = build_model(config, device="meta")
        model.load_state_dict(weights, assign=True)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    except (RuntimeError, TypeError, ValueError) as error:  # an impossible shape, or names and shapes that do not fit
        stock = huggingface.is_folder(path)
        files = "config.json and *.safetensors" if stock else f"{checkpoint.MODEL_CONFIG} and {checkpoint.MODEL}"
        raise CheckpointError(f"{path}: {files} do not fit together: {error}") from error
    model.compute_tables("cpu")
    return model.to(device).eval(), tokenizer, config


def _shortened(
    config: ModelConfig, weights: dict[str, "Tensor"], context: int
) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """The same model for sequences of at most `context` tokens."""
    learned = "position_embedding.weight"  # one row a position
    if learned in weights:
        weights = weights | {learned: weights[learned][:context].clone()}
    return dataclasses.replace(config, context=context), weights
