"""A model as mlx-lm and MLX Swift read it: a folder like Hugging Face's, in a class of theirs (export/stock.py).

The classes are not transformers': `mistral` is a Llama there and drops the window, Llama has layers with windows, and a
folder for one of the two programs may load in the other and compute something else. Where mlx-lm is installed, it is
loaded and compared; its CPU build on Linux does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.huggingface import CONFIG, WEIGHTS, stock_weights
from export import Options, stock, stock_check
from export.huggingface import BYTES, version_of, write_config, write_weights
from export.trained import Trained
from models.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

OPTIONS = {"dtype": ("float32", "float16")}
tell = stock_check.tell


def problems(trained: Trained, options: Options) -> list[str]:
    """That no class of mlx-lm computes what the model does."""
    row = stock.home(stock.MLX, trained.config)
    return [] if row else [f"{trained.path}: {stock.refusal(stock.MLX, trained.config)}"]


def room(trained: Trained, options: Options) -> int:
    """Bytes on the disk: the weights, a head of their own beside them, and the tokenizer."""
    head = trained.config.vocab_size * trained.config.d_model
    return int(1.02 * BYTES[options.dtype or "float16"] * (trained.config.parameters()["total"] + head)) + 20_000_000


def write(trained: Trained, options: Options, folder: Path) -> dict[str, Any]:
    """config.json and model.safetensors into `folder`; returns the report.

    Raises:
        ExportFault: what was written does not compute what the checkpoint does.
    """
    import torch

    dtype = options.dtype or "float16"
    row = stock.home(stock.MLX, trained.config)
    config, weights = stock.settled(row, trained.config, trained.model.state_dict())
    write_weights(folder / WEIGHTS, _stored(row, config, weights), dtype)
    write_config(folder / CONFIG, row, config, trained, {})
    installed = version_of("mlx_lm", "mlx-lm")
    rounded = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in weights.items()}
    client = (lambda ids: logits(folder, ids)) if installed else None
    parity = stock_check.check(trained, config, rounded, client, dtype)
    return {
        "home": stock_check.about(row, trained.config),
        "dtype": dtype,
        "weight_bytes": (folder / WEIGHTS).stat().st_size,
        "checked_with": f"mlx-lm {installed}" if installed else None,
        "parity": parity,
        "not_verified": ["the numbers that a Mac's or a phone's GPU computes", "MLX Swift"] if installed else
                        ["that mlx-lm computes the same: it is not installed here"],
    }  # fmt: skip


def logits(folder: Path, ids: list[int]) -> "np.ndarray":
    """[T, V] in fp32, as mlx-lm computes them with what is in `folder`."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    model, _ = mlx_lm.load(str(folder))  # the tokenizer too, as clients do
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([ids]))[0])


def _stored(row: stock.Home, config: ModelConfig, weights: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """By the names of the class. Those of mimo_v2_flash, mellum and qwen3 are Llama's, experts apart."""
    if row.name == "gpt2":
        return {name.removeprefix("transformer."): tensor
                for name, tensor in stock_weights("gpt2", config, weights).items()}  # fmt: skip
    stored = stock_weights("llama", config, weights)
    return _as_experts(config, stored) if row.name == "mellum" else stored


def _as_experts(config: ModelConfig, stored: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Each feed-forward as the one expert of one, and a gate that has nothing to choose from."""
    import torch

    found = {}
    for name, tensor in stored.items():
        expert = ".mlp." in name
        found[name.replace(".mlp.", ".mlp.switch_mlp.") if expert else name] = tensor[None] if expert else tensor
    for layer in range(config.n_layers):
        found[f"model.layers.{layer}.mlp.gate.weight"] = torch.zeros(1, config.d_model)
    return found
