"""Does a Core ML package compute what its checkpoint does? Asked of export/mil.py, which runs it without a Mac.

Several questions, because their answers mean different things. Are the weights and tables the checkpoint's, to the bit
in fp16, to half a step in int8? Is the graph the model's: both in fp32, torch with the package's own weights, so that
only a wrong operation makes a difference; over chunks longer than a window, after a new state, and at the end of the
context? What does rounding to fp16 change, with sums in fp32 and in fp16, between which devices lie? And how far is
the whole from the checkpoint?
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import ExportFault
from export.bundle import golden_ids
from export.traced import STATES
from export.trained import Trained

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from export.mil import Package

SUFFIXES = ("", "_to_fp16")  # coremltools' own, behind a parameter's name
QUANTIZED = tuple(suffix + how for suffix in SUFFIXES for how in ("_quantized", "_palettized"))
SHORTEST = 128  # tokens checked at least
AT_THE_END = 8  # tokens checked before the end of the context
ROUNDED_MOST = 0.01  # mean KL that rounding may come to over those few
SUMMED_AT_MOST, LEAST_SUMMED = 200_000_000, 4  # weights times positions, and positions, whose sums are taken in fp16
LARGEST_TOLD = 5  # kinds of operations with the largest numbers
BLOCK = 32  # weights of a row that share a scale in int4
# Of the largest weight that shares a scale: half a step of rounding, and the scale's own rounding to fp16. Of a palette
# there is no such bound: k-means weighs many weights against few.
HALF_A_STEP = {"int8": 0.5 / 127 + 2**-10, "int4": 0.5 / 7 + 2**-10}


def check(path: Path, trained: Trained, quantized: str | None = None) -> dict[str, Any]:
    """How far the package at `path`, whose weights are `quantized` in one of coreml's ways, is from the checkpoint; for
    export_report.json.

    Raises:
        ExportFault: an operation that is not known, a shape that is not as declared, a number that is none, a weight
            that is another, or a graph that computes something else.
    """
    from export.program import OperationFault, PackageError, UnknownOperation

    try:
        return _checked(path, trained, quantized)
    except (PackageError, UnknownOperation, OperationFault) as error:
        raise ExportFault(f"the package is not right: {error}") from error


def _checked(path: Path, trained: Trained, quantized: str | None) -> dict[str, Any]:
    import numpy as np

    from export.mil import PRECISIONS, Package, Writer
    from export.parity import ROUNDING, compare

    lengths = chunk_lengths(trained)
    ids, drawn = golden_ids(trained, sum(lengths)), trained.drawn
    exact, seen = Package(path), {}
    held = holding(exact, trained.model, quantized)
    expected = logits_of(held, ids)[:, drawn]
    for precision in PRECISIONS:
        package = exact if precision == "fp32" else Package(path, precision)
        writer = Writer(package)
        few = len(ids) if precision != "fp16-accumulate" else _few(trained, len(ids))
        seen[precision] = np.concatenate([writer.logits(part) for part in split(ids[:few], lengths)])[:, drawn]
        if problems := package.findings.problems():
            raise ExportFault(f"the package is not right ({precision}): " + "; ".join(problems[:5]))
        del package, writer  # its weights, before the next one's
    graph = _same("the graph", expected, seen["fp32"])
    again = Writer(exact).logits(ids[: lengths[0]])[:, drawn]
    _same("a second text, with a new state,", expected[: lengths[0]], again)
    if exact.program.states:
        _check_end(exact, held, trained, ids, drawn)
        _check_end(Package(path, "fp16"), held, trained, ids, drawn)
    rounded = {name: compare(expected[: len(seen[name])], seen[name]) for name in PRECISIONS[1:]}
    whole = compare(logits_of(trained.model, ids)[:, drawn], seen["fp16"])
    largest = list(exact.findings.largest_by_kind().items())[:LARGEST_TOLD]
    return {
        "positions": len(ids),
        "chunks": lengths,
        "at_the_end_of_the_context": AT_THE_END if exact.program.states else 0,
        "operations": len({operation.kind for operation in exact.program.operations}),
        "graph": dataclasses.asdict(graph),
        "fp16": dataclasses.asdict(rounded["fp16"]),
        "fp16_accumulate": dataclasses.asdict(rounded["fp16-accumulate"]),
        "against_checkpoint": dataclasses.asdict(whole),
        "rounding_out_of_bounds": rounded["fp16"].problems(ROUNDING),
        "largest_numbers": dict(largest),
    }


def _same(what: str, expected: "np.ndarray", found: "np.ndarray") -> Any:
    """Their comparison, in fp32.

    Raises:
        ExportFault: they differ by more than the order of additions explains.
    """
    from export.parity import GRAPH, compare

    parity = compare(expected, found)
    if problems := parity.problems(GRAPH):
        raise ExportFault(f"{what} computes something else than the checkpoint: " + "; ".join(problems))
    return parity


def _check_end(package: "Package", held: "nn.Module", trained: Trained, ids: list[int], drawn: list[int]) -> None:
    """The last positions of the context, behind caches of zeros, one token and then several.

    Raises:
        ExportFault: the package is elsewhere than it should be.
    """
    import torch

    from export.mil import Writer
    from export.parity import Bounds, compare
    from export.traced import position, set_position

    length = min(AT_THE_END, trained.config.context - 1)
    start = trained.config.context - length
    writer, state = Writer(package), held.new_state(1)
    set_position(*(writer.state[name] for name in STATES), start)
    state.hold(trained.config.context)
    state.length = start
    for part in split(ids[:length], [1, length - 1]):
        with torch.inference_mode():
            expected = held.step(torch.tensor([part]), state)[0].numpy()[:, drawn]
        found = writer.logits(part)[:, drawn]
        reached = position(*(writer.state[name] for name in STATES))
        if reached != state.length:
            raise ExportFault(f"positions are not exact: after {state.length} tokens the package is at {reached}")
        if package.precision == "fp32":
            _same("the end of the context", expected, found)
        elif problems := compare(expected, found).problems(Bounds(mean_kl=ROUNDED_MOST)):
            raise ExportFault("the end of the context is computed otherwise in fp16: " + "; ".join(problems))


def holding(package: "Package", model: "nn.Module", quantized: str | None = None) -> "nn.Module":
    """A copy of `model` with the weights and tables that the package holds, rounded and quantised as they are there.

    Raises:
        ExportFault: one is nowhere in the package, or differs from the checkpoint's by more than rounding.
    """
    import numpy as np
    import torch

    wrong, copies = [], {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # of these: rotary tables
        exact = tensor.detach().numpy()
        value, is_quantized = _kept(package, name, exact, quantized)
        if value is None:
            wrong.append(f"{name} is nowhere in the package")
        elif is_quantized and quantized is None:
            wrong.append(f"{name} is quantised, and nobody asked for it")
        elif is_quantized and (exact.ndim != 2 or not isinstance(tensor, torch.nn.Parameter)):
            wrong.append(f"{name} is quantised, and no matrix of weights")
        elif problem := _unlike(exact, value, quantized if is_quantized else None):
            wrong.append(f"{name} {problem}")
        else:
            kept = torch.from_numpy(np.ascontiguousarray(value))  # the package's own memory, where it is fp32
            copies[id(tensor)] = torch.nn.Parameter(kept, False) if isinstance(tensor, torch.nn.Parameter) else kept
    if wrong:
        raise ExportFault("weights are not the checkpoint's: " + "; ".join(wrong[:5]))
    return copy.deepcopy(model, copies)


def _kept(
    package: "Package", name: str, exact: "np.ndarray", quantized: str | None
) -> tuple["np.ndarray | None", bool]:
    """What the package holds for a tensor, in fp32, and whether it is quantised: found by its name, or by its value,
    for equal constants are kept once, and the product that makes the logits gives its weights its own name."""
    import numpy as np

    for suffix in (*SUFFIXES, *QUANTIZED):
        value = package.constant("model_" + name.replace(".", "_") + suffix)
        if value is not None and value.shape == exact.shape:
            return value.astype(np.float32, copy=False), suffix in QUANTIZED
    for rounded in (exact, exact.astype(np.float16).astype(np.float32)):
        if any(np.array_equal(other, rounded) for other in package.constants_of(exact.shape)):
            return rounded, False
    if quantized is not None and exact.ndim == 2:
        for other in package.constants_of(exact.shape):
            if _unlike(exact, other, quantized) is None:
                return other, True
    if exact.ndim == 1 and (exact == exact[0]).all() and exact[0] in (0, 1):
        return exact, False  # of a model that was never trained: coremltools leaves out what adds 0 or multiplies by 1
    return None, False


def _unlike(exact: "np.ndarray", value: "np.ndarray", quantized: str | None) -> str | None:
    """How `value` differs from what it should be: `exact`, in fp32 or fp16 to the bit, or quantised."""
    import numpy as np

    off = np.abs(value - exact)
    if quantized == "palette4":
        right = off.mean() <= 0.25 * np.abs(exact).mean()  # 16 numbers, well chosen, come to a tenth
        return None if right else f"is off by {off.mean():.3g} on average, which is no palette of it"
    if quantized is not None:
        in_blocks = quantized == "int4" and exact.shape[1] % BLOCK == 0
        width = BLOCK if in_blocks else exact.shape[1]
        largest = np.abs(exact).reshape(len(exact), -1, width).max(axis=2, keepdims=True)
        right = (off.reshape(len(exact), -1, width) <= HALF_A_STEP[quantized] * largest).all()
        return None if right else f"is off by {off.max():.3g}, more than half a step of {quantized}"
    if np.array_equal(value, exact) or np.array_equal(value, exact.astype(np.float16).astype(np.float32)):
        return None
    return f"is off by {off.max():.3g}, which is no rounding to fp16"


def chunk_lengths(trained: Trained) -> list[int]:
    """Lengths of what is fed: short, single, longer than the largest window, single."""
    context = trained.config.context
    rest = max(trained.largest_window + 3, SHORTEST)
    wanted = [7, 1, 1, rest, 5, 1, 1]
    wanted[3] = max(1, min(rest, context - (sum(wanted) - rest)))
    while sum(wanted) > context and len(wanted) > 1:
        wanted.pop()
    return [min(wanted[0], context), *wanted[1:]]


def _few(trained: Trained, length: int) -> int:
    """Positions for sums in fp16, which are taken a term at a time: fewer of a larger model."""
    return min(length, max(LEAST_SUMMED, SUMMED_AT_MOST // trained.config.parameters()["total"]))


def split(ids: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """`ids` in parts of those lengths, as far as they go."""
    parts, start = [], 0
    for length in lengths:
        parts.append(list(ids[start : start + length]))
        start += length
    return [part for part in parts if part]


def logits_of(model: "nn.Module", ids: Sequence[int]) -> "np.ndarray":
    """[T, V] in fp32."""
    import torch

    with torch.inference_mode():
        return model.step(torch.tensor([list(ids)]), model.new_state(1))[0].numpy()
