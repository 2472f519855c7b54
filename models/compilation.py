"""How torch.compile is used: block by block, so that all layers of a kind share what was compiled for one.

Training compiles for the shapes that there are, a few for each phase; decoding lets a cache's length vary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.kernels.limits import allow_many


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block's forward pass, in place, so that weights keep their names; `options` go to torch.compile."""
    allow_many()
    for block in model.blocks:
        block.compile(dynamic=False, **options)


def compile_steps(model: nn.Module) -> None:
    """Compile each block's decoding step. The first tokens then take minutes, the others less time than before where
    Python is what they wait for: on GPUs, and for small models."""
    for block in model.blocks:
        block.step = torch.compile(block.step)


def compile_recorded_steps(model: nn.Module, **options: Any) -> None:
    """Compile each block's decoding step where it is recorded for a graph (models/inference/captured.py), and there
    alone: its shapes are few and fixed, and everything else goes on as it was; `options` go to torch.compile."""
    allow_many()
    for block in model.blocks:
        block.step = _where_recorded(block.step, torch.compile(block.step, dynamic=False, **options))


def _where_recorded(plain: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def step(x: Tensor, rotation: Any, cache: Any, state: Any) -> Tensor:
        return (plain if state.place is None else compiled)(x, rotation, cache, state)

    return step
