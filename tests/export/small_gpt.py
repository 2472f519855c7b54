"""A small model of language, its Core ML package, and ways to damage one: what the checker's tests look at."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, CONTEXT = 290, 32, 2, 24
ENTRIES = 32  # of the caches: the last one holds the position
DATA = "Data/com.apple.CoreML"


class SmallGPT(nn.Module):
    """One block with LayerNorm, one with RMSNorm; learned positions, full attention, a tied head.

    With `stateful`, keys and values are kept in two states in which the layers lie behind one another along the heads,
    and the number of tokens seen in the last entry of the first.
    """

    def __init__(self, stateful: bool, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.stateful, self.activation = stateful, activation
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.joined = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=bias) for bias in (True, False))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 48) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(48, WIDTH) for _ in range(2))
        for name in ("keyCache", "valueCache"):
            self.register_buffer(name, torch.zeros(1, 2 * HEADS, ENTRIES, WIDTH // HEADS))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [1, T] int32 -> logits [1, T, VOCAB]."""
        new = ids.shape[1]
        seen = self.keyCache[0, 0, -1, :1].to(torch.int32) if self.stateful else torch.zeros(1, dtype=torch.int32)
        fresh = seen + torch.arange(new, dtype=torch.int32)  # [T]
        slots = torch.arange(ENTRIES, dtype=torch.int32)
        written = (slots[:, None] == fresh).to(torch.float32)  # [E, T]
        visible = slots <= fresh[:, None] if self.stateful else fresh <= fresh[:, None]
        mask = (1 - visible[None, None].to(torch.float32)) * -3e4
        x = self.tokens(ids) + self.places(fresh)[None]
        keys, values = [], []
        for layer in range(2):
            rms = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale
            joined = self.joined[layer](rms if layer else self.norm(x))
            query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in joined.chunk(3, -1))
            if self.stateful:
                heads = slice(layer * HEADS, (layer + 1) * HEADS)
                kept = 1 - written.sum(1, keepdim=True)
                key = self.keyCache[:, heads] * kept + written @ key
                value = self.valueCache[:, heads] * kept + written @ value
                keys.append(key)
                values.append(value)
            seen_by = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + self.out[layer](seen_by.transpose(1, 2).flatten(2))
            x = x + self.down[layer](self.activation(self.up[layer](x)))
        if self.stateful:
            last = (slots == ENTRIES - 1).to(torch.float32)[:, None]  # [E, 1]
            self.keyCache[:] = torch.cat(keys, 1) * (1 - last) + last * (seen + new).to(torch.float32)
            self.valueCache[:] = torch.cat(values, 1)
        return x @ self.tokens.weight.T


def build(stateful: bool, activation: Callable[[Tensor], Tensor]) -> SmallGPT:
    """A model whose weights are exact in fp16, so that the package holds them as they are."""
    torch.manual_seed(7)
    model = SmallGPT(stateful, activation).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    return model


def convert(model: SmallGPT, path: Path) -> Path:
    """Write the model's package to `path`."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools as ct

    traced = torch.jit.trace(model, torch.zeros(1, 5, dtype=torch.int32), check_trace=False)
    model.keyCache.zero_()
    model.valueCache.zero_()
    states = [
        ct.StateType(ct.TensorType(shape=tuple(model.keyCache.shape), dtype=np.float16), name=name)
        for name in ("keyCache", "valueCache")
    ]
    ct.convert(
        traced,
        inputs=[ct.TensorType("inputIds", (1, ct.RangeDim(1, CONTEXT, 5)), dtype=np.int32)],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=states if model.stateful else None,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    ).save(str(path))
    return path


def damaged(package: Path, path: Path, change: Callable[[Any], None]) -> Path:
    """A copy of `package` at `path`, whose protobuf `change` has changed."""
    from coremltools.proto import Model_pb2

    shutil.copytree(package, path)
    file = path / DATA / "model.mlmodel"
    specification = Model_pb2.Model.FromString(file.read_bytes())
    change(specification)
    file.write_bytes(specification.SerializeToString())
    return path


def operations(specification: Any) -> Any:
    """The operations of the main function in a package's protobuf."""
    function = specification.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations
