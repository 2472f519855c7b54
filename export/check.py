"""Does a Core ML package compute what its checkpoint does? Asked of export/mil.py, which runs it without a Mac.

Three questions, because their answers mean different things: whether the graph is the model's (both in fp32, torch with
the package's own weights, so that only a wrong operation can make a difference); what rounding to fp16 changes, with
sums in fp32 and in fp16, between which devices lie; and how far the whole is from the checkpoint, quantised or not.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import ExportFault
from export.trained import Trained

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from export.mil import Package

SUFFIXES = ("", "_to_fp16", "_quantized", "_to_fp16_quantized")  # coremltools' own, behind a parameter's name
SHORTEST = 128  # tokens checked at least
LARGEST_TOLD = 5  # kinds of operations with the largest numbers


def check(path: Path, trained: Trained) -> dict[str, Any]:
    """How far the package at `path` is from the checkpoint, over a text longer than its windows, in chunks of many
    lengths; for export_report.json.

    Raises:
        ExportFault: an operation that is not known, a shape that is not as declared, a number that is none, a weight
            that is nowhere, or a graph that computes something else.
    """
    import numpy as np

    from export.mil import PRECISIONS, Package, Writer
    from export.parity import GRAPH, ROUNDING, compare

    lengths = _chunks(trained)
    ids = _text(trained, sum(lengths))
    drawn = np.setdiff1d(np.arange(trained.config.vocab_size), trained.never)
    exact, seen = Package(path), {}
    held = holding(exact, trained.model)
    expected = _logits(held, ids)[:, drawn]
    for precision in PRECISIONS:
        package = exact if precision == "fp32" else Package(path, precision)
        writer = Writer(package)
        parts = [writer.logits(part) for part in _split(ids, lengths)]
        seen[precision] = np.concatenate(parts)[:, drawn]
        if problems := package.findings.problems():
            raise ExportFault(f"the package is not right ({precision}): " + "; ".join(problems[:5]))
    graph = compare(expected, seen["fp32"])
    if problems := graph.problems(GRAPH):
        raise ExportFault("the package computes something else than the checkpoint: " + "; ".join(problems))
    rounded = {name: compare(expected, seen[name]) for name in PRECISIONS[1:]}
    whole = compare(_logits(trained.model, ids)[:, drawn], seen["fp16"])
    largest = list(exact.findings.largest_by_kind().items())[:LARGEST_TOLD]
    return {
        "positions": len(ids),
        "chunks": lengths,
        "operations": len({operation.kind for operation in exact.program.operations}),
        "graph": dataclasses.asdict(graph),
        "fp16": dataclasses.asdict(rounded["fp16"]),
        "fp16_accumulate": dataclasses.asdict(rounded["fp16-accumulate"]),
        "against_checkpoint": dataclasses.asdict(whole),
        "rounding_out_of_bounds": rounded["fp16"].problems(ROUNDING),
        "largest_numbers": dict(largest),
    }


def holding(package: "Package", model: "nn.Module") -> "nn.Module":
    """A copy of `model` with the weights and tables that the package holds, rounded and quantised as they are there.

    Raises:
        ExportFault: a weight is nowhere in the package.
    """
    import torch

    held = copy.deepcopy(model)
    missing = []
    for name, parameter in (*held.named_parameters(), *held.named_buffers()):  # of these: rotary tables
        value = _weight(package, name, parameter)
        if value is None:
            missing.append(name)
        else:
            parameter.data = torch.from_numpy(value.copy()).to(parameter.dtype)
    if missing:
        raise ExportFault(f"weights are nowhere in the package: {', '.join(missing[:5])}")
    return held


def _weight(package: "Package", name: str, parameter: Any) -> "np.ndarray | None":
    """What the package holds for a parameter: by its name, or by its value, for equal constants are kept once."""
    import numpy as np

    shape = tuple(parameter.shape)
    for suffix in SUFFIXES:
        value = package.constant("model_" + name.replace(".", "_") + suffix)
        if value is not None and value.shape == shape:
            return value.astype(np.float32)
    exact = parameter.detach().numpy()
    for rounded in (exact, exact.astype(np.float16).astype(np.float32)):
        for other in package.constants_of(shape):
            if np.array_equal(other, rounded):
                return rounded
    return None


def _chunks(trained: Trained) -> list[int]:
    """Lengths of what is fed: short, single, longer than the largest window, single."""
    context = trained.config.context
    window = max((trained.config.layer_window(layer) or 0) for layer in range(trained.config.n_layers))
    rest = max(window + 3, SHORTEST)
    wanted = [7, 1, 1, rest, 5, 1, 1]
    while sum(wanted) > context:
        if wanted[3] > 1:
            wanted[3] = max(1, wanted[3] - (sum(wanted) - context))
        else:
            wanted.pop()
    return wanted


def _text(trained: Trained, length: int) -> list[int]:
    """The golden prompts' ids, over and over: text of many kinds."""
    from export.bundle import GOLDEN_TEXTS

    ids = [token for text in GOLDEN_TEXTS.values() for token in trained.tokenizer.encode(text)]
    return (trained.begin + ids * (length // len(ids) + 1))[:length]


def _split(ids: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(list(ids[start : start + length]))
        start += length
    return parts


def _logits(model: "nn.Module", ids: Sequence[int]) -> "np.ndarray":
    """[T, V] in fp32."""
    import torch

    with torch.inference_mode():
        return model.step(torch.tensor([list(ids)]), model.new_state(1))[0].numpy()
