"""A model from whatever holds one: a run's folder, one of its checkpoints, or a stock Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import checkpoint, huggingface
from checkpoints.checkpoint import CheckpointError
from models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokenizer import Tokenizer


def locate(path: str | Path) -> Path:
    """The folder that `path` means: a Hugging Face model's, a checkpoint, or the newest verified one of a run.

    Raises:
        CheckpointError: there is none, or it does not verify.
    """
    return Path(path) if huggingface.is_folder(path) else checkpoint.resolve(path)


def read_model(path: Path) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """Shape and weights of the model in a folder that `locate` gave."""
    if huggingface.is_folder(path):
        return huggingface.read(path)
    return checkpoint.read_model_config(path), checkpoint.read_weights(path)


def tokenizer_of(path: Path) -> Path:
    """Where the tokenizer lies that belongs to the model in a folder that `locate` gave."""
    return path if huggingface.is_folder(path) else path / checkpoint.TOKENIZER


def text_start(path: str | Path, tokenizer: "Tokenizer") -> list[int]:
    """The ids with which every text begins, for the model at `path` (as `locate` takes it).

    A run of ours was trained with the end-of-text token before each document (data/loader.py); a stock Hugging Face
    model continues a text as it is, and its chat template writes whatever belongs before the first turn.
    """
    return [] if huggingface.is_folder(path) else [tokenizer.end_of_text]


def load_model(path: str | Path, device: str = "cpu") -> tuple["nn.Module", "Tokenizer", ModelConfig]:
    """The model in evaluation mode, its tokenizer and its config, from anything that `locate` finds.

    Raises:
        CheckpointError: there is no model, or it does not verify.
    """
    from models import build_model
    from tokenizer import Tokenizer, TokenizerError

    path = locate(path)
    config, weights = read_model(path)
    try:
        tokenizer = Tokenizer.load(tokenizer_of(path))
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
