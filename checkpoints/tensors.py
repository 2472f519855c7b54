"""Weights out of safetensors files, one after the other to where they are wanted, so that none of them is in memory
twice and no file as a whole."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NORM = re.compile(r"norm|\bln_")  # in the names of all architectures that are read


def read(file: Path, place: Callable[[str, "Tensor"], "Tensor"] | None = None) -> dict[str, "Tensor"]:
    """Every tensor of `file`, by name: what `place(name, tensor)` makes of it, if it is given.

    Raises:
        OSError, SafetensorError: the file cannot be read, or is none.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return {name: place(name, opened.get_tensor(name)) if place else opened.get_tensor(name) for name in names}


def placing(device: "str | torch.device", dtype: "torch.dtype | None" = None) -> Callable[[str, "Tensor"], "Tensor"]:
    """For `read`: each weight to `device`, in `dtype` (None: fp32), the norms in fp32 whatever it is, as decoding has
    them (models/inference/ready.py)."""
    import torch

    def place(name: str, tensor: "Tensor") -> "Tensor":
        wanted = torch.float32 if dtype is None or _NORM.search(name) else dtype
        return tensor.to(device=device, dtype=wanted)

    return place
