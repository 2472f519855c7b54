"""A model as a Hugging Face folder, in the stock class of transformers whose mathematics is ours (export/stock.py).

config.json has the class's own keys, model.safetensors its names; `checkpoints/huggingface.py` reads the same back, and
so do other programs that take such folders. Where transformers is installed, it is loaded and compared.
"""

import json
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.huggingface import CONFIG, WEIGHTS, read, stock_weights
from export import ExportFault, Options, stock, stock_check
from export.trained import Trained
from models.config import ModelConfig
from storage import folder as storage_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

OPTIONS = {"dtype": ("float32", "float16")}
BYTES = {"float32": 4, "float16": 2}
CLASSES = {
    "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "ministral": "MinistralForCausalLM", "granite_swa": "GraniteSWAForCausalLM",
    "mellum": "MellumForCausalLM",
}  # fmt: skip
tell = stock_check.tell


def problems(trained: Trained, options: Options) -> list[str]:
    """That no class of transformers computes what the model does."""
    row = stock.home(stock.TRANSFORMERS, trained.config)
    return [] if row else [f"{trained.path}: {stock.refusal(stock.TRANSFORMERS, trained.config)}"]


def room(trained: Trained, options: Options) -> int:
    """Bytes on the disk: the weights, and the tokenizer beside them."""
    return int(1.02 * BYTES[options.dtype or "float32"] * trained.config.parameters()["total"]) + 20_000_000


def write(trained: Trained, options: Options, folder: Path) -> dict[str, Any]:
    """config.json and model.safetensors into `folder`; returns the report.

    Raises:
        ExportFault: what was written does not compute what the checkpoint does.
    """
    dtype = options.dtype or "float32"
    row = stock.home(stock.TRANSFORMERS, trained.config)
    config, weights = stock.settled(row, trained.config, trained.model.state_dict())
    write_weights(folder / WEIGHTS, stock_weights(row.name, config, weights), dtype)
    write_config(folder / CONFIG, row, config, trained, {"architectures": [CLASSES[row.name]], "dtype": dtype})
    read_back = _read_back(folder, config, weights, dtype)
    installed = version_of("transformers")
    client = (lambda ids: logits(folder, ids)) if installed else None
    parity = stock_check.check(trained, config, read_back, client, dtype)
    return {
        "home": stock_check.about(row, trained.config),
        "dtype": dtype,
        "weight_bytes": (folder / WEIGHTS).stat().st_size,
        "checked_with": f"transformers {installed}" if installed else None,
        "parity": parity,
        "not_verified": ["programs other than transformers that read this folder"] if installed else
                        ["that transformers computes the same: it is not installed here"],
    }  # fmt: skip


def logits(folder: Path, ids: list[int]) -> "np.ndarray":
    """[T, V] in fp32, as transformers computes them with what is in `folder`."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def write_weights(path: Path, weights: Mapping[str, "Tensor"], dtype: str) -> None:
    """A safetensors file of `weights` in `dtype`."""
    import torch
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    # A copy of what is there under two names: the format has no tensor twice.
    seen: set[int] = set()
    stored = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().to(wanted).contiguous()
        stored[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it makes files that nobody else may read


def write_config(path: Path, row: stock.Home, config: ModelConfig, trained: Trained, more: Mapping[str, Any]) -> None:
    """config.json: the keys of the class, and the tokens that begin and end."""
    begin = {"bos_token_id": trained.begin[0] if trained.begin else None}
    keys = {"model_type": row.name, **more, **row.keys(config), **begin, "eos_token_id": trained.end}
    storage_folder.write_file(path, json.dumps(keys, indent=2) + "\n")


def version_of(package: str, distribution: str | None = None) -> str | None:
    """The installed version of a package that can be imported; None if there is none.

    Args:
        distribution: what pip calls it, if otherwise.
    """
    try:
        import_module(package)
        return metadata.version(distribution or package)
    except (ImportError, metadata.PackageNotFoundError):
        return None


def _read_back(folder: Path, config: ModelConfig, weights: Mapping[str, "Tensor"], dtype: str) -> dict[str, "Tensor"]:
    """The weights, as our own reader finds them.

    Raises:
        ExportFault: another shape, or other weights than were written.
    """
    import torch

    found, read_back = read(folder)
    if found.identity() != config.identity():
        raise ExportFault(f"{CONFIG} is read back as another shape: {found}")
    for name, tensor in weights.items():
        if not torch.equal(read_back[name], tensor.to(getattr(torch, dtype)).float()):
            raise ExportFault(f"{WEIGHTS} has another {name} than was written")
    return read_back
