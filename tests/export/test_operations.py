"""What operations compute is what Apple's own `value_inference` in coremltools says, and what torch computes.

`CASES` holds inputs for every operation. Each goes through an operation of ours and through one that coremltools builds
of the same constants, whose value it works out while it builds, for floating-point numbers in fp32 and in fp16; and
through a function of torch. Constants that are stored smaller than they are are compared with coremltools' own decoding
of the same package, and one whole package runs in coremltools with its inputs made constant.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from export import mil, program
from export.operations import OPERATIONS, UnknownOperation
from tests.export import small_gpt

ct = pytest.importorskip("coremltools")

_random = np.random.default_rng(3)


def real(*shape: int) -> np.ndarray:
    return _random.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(real(*shape)) + np.float32(0.1)


def whole(*shape: int, low: int = -9, high: int = 10) -> np.ndarray:
    return _random.integers(low, high, shape).astype(np.int32)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def truth(*values: int) -> np.ndarray:
    return np.array(values, bool)


Inputs = dict[str, Any]
NEVER = np.float32(-3e4)
HIDING = np.where(np.tri(3, 5, 2, bool), np.float32(0), NEVER)  # a mask: what comes later is hidden

UNARY = ["abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "relu", "round", "sigmoid", "sign", "silu", "sin",
         "softplus", "square", "tanh", "identity"]  # fmt: skip
BINARY = ["add", "sub", "mul", "real_div", "floor_div", "mod", "maximum", "minimum", "equal", "not_equal", "less",
          "less_equal", "greater", "greater_equal"]  # fmt: skip
# Halves, to see how they are rounded; large numbers, to see whether anything overflows on the way
CURVE = np.array([-30.0, -2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 4.0, 9.0], np.float32)

CASES: dict[str, list[Inputs]] = {
    **{kind: [{"x": real(2, 3)}, {"x": np.clip(CURVE, -30, 9)}, {"x": np.float32(0.7)}] for kind in UNARY},
    **{
        kind: [
            {"x": real(2, 3), "y": real(2, 3)},
            {"x": real(4, 1, 3), "y": real(2, 1)},
            {"x": np.float32(1.5), "y": real(3)},
            {"x": np.float32(1.5), "y": np.float32(-0.5)},
        ]
        for kind in BINARY
    },
    **{kind: [{"x": truth(1, 0, 1, 0), "y": truth(1, 1, 0, 0)}, {"x": truth(1, 0)[:, None], "y": truth(1, 0)}]
       for kind in ("logical_and", "logical_or", "logical_xor")},
    **{kind: [{"x": real(2, 3, 4), "axes": i32(-1), "keep_dims": True}, {"x": real(2, 3, 4), "axes": i32(0, 2)},
              {"x": real(2, 3)}, {"x": whole(2, 3), "axes": i32(1)}]
       for kind in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum_square")},
    **{kind: [{"x": real(2, 3, 4), "axes": i32(-1), "keep_dims": True}, {"x": real(2, 3, 4), "axes": i32(0, 1)},
              {"x": real(2, 3)}] for kind in ("reduce_mean", "reduce_l2_norm")},
    **{kind: [{"x": real(2, 5)}, {"x": real(2, 5), "axis": 0, "keep_dims": True}, {"x": whole(2, 5), "axis": 1}]
       for kind in ("reduce_argmax", "reduce_argmin")},
    "sqrt": [{"x": positive(2, 3)}],
    "log": [{"x": positive(2, 3)}, {"x": positive(3), "epsilon": np.float32(0.5)}],
    "rsqrt": [{"x": positive(2, 3)}, {"x": positive(3), "epsilon": np.float32(0.5)}],
    "inverse": [{"x": positive(2, 3)}, {"x": positive(3), "epsilon": np.float32(0.5)}],
    "logical_not": [{"x": truth(1, 0)}],
    "clip": [{"x": real(9), "alpha": np.float32(-0.5), "beta": np.float32(1.0)}],
    "gelu": [{"x": CURVE}, *({"x": real(9), "mode": mode} for mode in
                             ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"))],
    "cast": [{"x": CURVE, "dtype": dtype} for dtype in ("int32", "bool", "fp16", "fp32", "int8")]
    + [{"x": whole(5), "dtype": dtype} for dtype in ("fp32", "bool", "int16")]
    + [{"x": truth(1, 0), "dtype": dtype} for dtype in ("fp16", "int32")] + [{"x": np.int32(7), "dtype": "fp32"}],
    "pow": [{"x": positive(2, 3), "y": real(3)}, {"x": real(2, 3), "y": np.float32(2)}, {"x": whole(4), "y": i32(3)}],
    "select": [{"cond": truth(1, 0, 1), "a": real(2, 3), "b": np.float32(-5)},
               {"cond": truth(1, 0)[:, None], "a": whole(3), "b": whole(2, 1)}],
    "cumsum": [{"x": real(3, 4), "axis": axis, "exclusive": exclusive, "reverse": reverse}
               for axis in (0, 1) for exclusive in (False, True) for reverse in (False, True)]
    + [{"x": whole(5)}, {"x": real(3, 2), "axis": -1}],
    "matmul": [{"x": real(2, 3, 4), "y": real(4, 5)}, {"x": real(3, 4), "y": real(2, 5, 4), "transpose_y": True},
               {"x": real(2, 1, 4, 3), "y": real(3, 4, 5), "transpose_x": True}, {"x": real(4), "y": real(4)},
               {"x": real(4), "y": real(2, 4, 3)}, {"x": real(2, 3, 4), "y": real(4)},
               {"x": whole(2, 3), "y": whole(3, 4)}],
    "linear": [{"x": real(2, 3, 4), "weight": real(5, 4), "bias": real(5)}, {"x": real(4), "weight": real(5, 4)},
               {"x": whole(3, 4), "weight": whole(5, 4), "bias": whole(5)}],
    "softmax": [{"x": real(2, 3, 4)}, {"x": real(2, 3, 4), "axis": 1}, {"x": real(2, 3) * 40},
                {"x": np.concatenate([real(3), [-np.inf, NEVER]]).astype(np.float32)}],
    "scaled_dot_product_attention": [
        {"query": real(1, 2, 3, 4), "key": real(1, 2, 5, 4), "value": real(1, 2, 5, 6), **mask}
        for mask in ({}, {"attn_mask": HIDING}, {"attn_mask": HIDING == 0}, {"attn_mask": HIDING[None, None]},
                     {"attn_mask": np.full((1, 5), -50, np.float32)}, {"attn_mask": real(2, 1, 5)})
    ] + [{"query": real(2, 1, 4), "key": real(2, 1, 4), "value": real(2, 1, 4)}],
    "layer_norm": [{"x": real(2, 3, 4), "axes": i32(-1), "gamma": real(4), "beta": real(4), "epsilon": np.float32(0.1)},
                   {"x": real(2, 3, 4), "axes": i32(1, 2), "gamma": real(3, 4)}, {"x": real(3, 4), "axes": i32(0)}],
    "gather": [{"x": real(5, 3), "indices": i32(4, 0, 4)}, {"x": real(5, 3), "indices": np.int32(2)},
               {"x": real(5), "indices": np.int32(2)},
               {"x": real(2, 5), "indices": whole(3, 2, low=0, high=5), "axis": 1},
               {"x": real(2, 5, 3), "indices": i32(0, 2), "axis": -1}, {"x": whole(4), "indices": i32()},
               {"x": real(2, 5, 3), "indices": whole(2, 4, low=0, high=5), "axis": 1, "batch_dims": 1},
               {"x": real(2, 3, 5), "indices": whole(2, 2, low=0, high=5), "axis": 2, "batch_dims": 1},
               {"x": real(2, 3, 5), "indices": whole(2, 3, 2, low=0, high=5), "axis": -1, "batch_dims": 2},
               {"x": real(5, 3), "indices": np.array([4, 1], np.uint16), "validate_indices": True}],
    "gather_along_axis": [{"x": real(4, 3), "indices": whole(2, 3, low=0, high=4)},
                          {"x": real(4, 3), "indices": whole(4, 5, low=0, high=3), "axis": -1}],
    "slice_by_index": [
        {"x": real(4, 5, 6), "begin": i32(1, 0, 2), "end": i32(3, 5, 6)},
        {"x": real(4, 5, 6), "begin": i32(1, 0, 0), "end": i32(4, 5, 5), "stride": i32(2, 1, 3)},
        {"x": real(4, 5), "begin": i32(-3, -2), "end": i32(-1, 5)},
        {"x": real(4, 5), "begin": i32(9, 1), "end": i32(9, 99), "begin_mask": truth(1, 0), "end_mask": truth(1, 1)},
        {"x": real(4, 5), "begin": i32(2, 0), "end": i32(2, 5)},
        {"x": real(4, 5), "begin": i32(-1, 1), "end": i32(0, 3), "squeeze_mask": truth(1, 0)},
        {"x": real(4, 5), "begin": i32(-1, 1), "end": i32(0, 0), "squeeze_mask": truth(1, 1)},
        {"x": whole(7), "begin": i32(3), "end": i32(0), "end_mask": truth(1)},
        {"x": whole(7), "begin": i32(6), "end": i32(0), "squeeze_mask": truth(1)},
        {"x": whole(3) > 0, "begin": i32(0), "end": i32(2)},
    ],
    "slice_by_size": [{"x": real(4, 5), "begin": i32(1, 0), "size": i32(2, 5)},
                      {"x": real(4, 5), "begin": i32(-3, 2), "size": i32(-1, -1)}],
    "slice_update": [
        {"x": real(4, 5), "update": real(2, 5), "begin": i32(1, 0), "end": i32(3, 5)},
        {"x": real(4, 5), "update": real(4, 2), "begin": i32(7, -3), "end": i32(0, -1), "begin_mask": truth(1, 0),
         "end_mask": truth(1, 0)},
        {"x": real(4, 5), "update": real(5), "begin": i32(-1, 0), "end": i32(0, 5), "squeeze_mask": truth(1, 0)},
        {"x": real(4, 6), "update": real(2, 3), "begin": i32(0, 0), "end": i32(4, 6), "stride": i32(2, 2)},
        {"x": whole(4), "update": whole(4), "begin": i32(0), "end": i32(4)},
    ],
    "concat": [{"values": [real(2, 3), real(2, 4)], "axis": 1}, {"values": [real(2, 3), real(1, 3)], "axis": -2},
               {"values": [real(2, 3), real(2, 3)], "axis": 0, "interleave": True},
               {"values": [real(2, 3), real(2, 3), real(2, 3)], "axis": -1, "interleave": True},
               {"values": [np.int32(3), np.int32(4)], "axis": 0}, {"values": [whole(2), whole(0)], "axis": 0}],
    "stack": [{"values": [real(2, 3), real(2, 3)], "axis": axis} for axis in (0, 1, -1)]
    + [{"values": [np.int32(3), np.int32(4)], "axis": 0}],
    "split": [{"x": real(2, 6), "axis": 1, "num_splits": 3}, {"x": real(5, 2), "axis": -2, "split_sizes": i32(1, 4)},
              {"x": whole(5), "axis": 0, "split_sizes": i32(2, 3), "num_splits": 2}],
    "reshape": [{"x": real(2, 6), "shape": i32(3, 4)}, {"x": real(2, 6), "shape": i32(3, -1)},
                {"x": real(2, 6), "shape": i32(0, 2, -1)[[1, 2, 0]]}, {"x": real(2, 50), "shape": i32(1, 0, -1, 0)},
                {"x": real(4), "shape": i32(1, 2, 2)}, {"x": np.float32(2), "shape": i32(1, 1)}],
    "expand_dims": [{"x": real(2, 3), "axes": i32(0)}, {"x": real(2, 3), "axes": i32(-1, 1)},
                    {"x": np.float32(3), "axes": i32(0)}],
    "squeeze": [{"x": real(1, 3, 1), "axes": i32(0)}, {"x": real(1, 3, 1), "axes": i32(-1, 0)}, {"x": real(1, 3, 1)}],
    "transpose": [{"x": real(2, 3, 4), "perm": i32(2, 0, 1)}, {"x": real(2, 3, 4), "perm": i32(-3, -1, -2)}],
    "tile": [{"x": real(2, 3), "reps": i32(2, 1)}, {"x": truth(1, 0), "reps": i32(3)}],
    "reverse": [{"x": real(2, 3)}, {"x": real(2, 3), "axes": i32(-1)}],
    "pad": [{"x": real(2, 3), "pad": i32(1, 2)},
            {"x": real(2, 3), "pad": i32(0, 1, 2, 0), "constant_val": np.float32(7)},
            {"x": real(2, 3), "pad": i32(2, 1), "mode": "reflect"},
            {"x": real(2, 3), "pad": i32(0, 0, 2, 1), "mode": "replicate"}],
    "shape": [{"x": real(2, 3)}, {"x": whole(0, 3)}],
    "range_1d": [{"start": np.int32(2), "end": np.int32(9), "step": np.int32(3)},
                 {"start": np.int32(4), "end": np.int32(0), "step": np.int32(-1)},
                 {"start": np.int32(4), "end": np.int32(4), "step": np.int32(1)},
                 {"start": np.float32(0), "end": np.float32(2), "step": np.float32(0.5)}],
    "fill": [{"shape": i32(2, 3), "value": np.float32(1.5)}, {"shape": i32(4), "value": np.int32(3)},
             {"shape": i32(2), "value": np.bool_(True)}],
    "fill_like": [{"ref_tensor": whole(2, 3), "value": np.float32(1.5)}],
    "band_part": [{"x": real(2, 4, 5), "lower": lower, "upper": upper} for lower, upper in
                  ((-1, 0), (0, -1), (0, 0), (1, 2))] + [{"x": whole(3, 3)}],
    "one_hot": [{"indices": i32(2, 0, 1), "one_hot_vector_size": np.int32(4)},
                {"indices": whole(2, 3, low=0, high=4), "one_hot_vector_size": np.int32(4), "axis": 1,
                 "on_value": np.float32(0.5), "off_value": np.float32(-2)},
                {"indices": i32(1), "one_hot_vector_size": np.int32(2), "axis": 0}],
}  # fmt: skip

for kind in ("abs", "sign", "square", "identity"):
    CASES[kind].append({"x": whole(5)})
for kind in BINARY:
    if kind != "real_div":
        CASES[kind].append({"x": whole(20), "y": whole(20, low=1) * i32(*([1, -1] * 10))})

DECODED = {kind for kind, definition in OPERATIONS.items() if definition.constant}  # tested with whole packages
NOT_INFERRED = {"silu", "one_hot"}  # coremltools works out no value of these
# Where coremltools' inference is not what its own documentation says, or fails: it forgets `interleave`, and knows no
# negative axis beside batch_dims, and no single fp16 number out of a slice
APPLES_FAULTS = {
    "concat": lambda inputs: inputs.get("interleave"),
    "gather": lambda inputs: inputs.get("batch_dims") and inputs["axis"] < 0,
    "slice_by_index": lambda inputs: inputs["x"].dtype == np.float16 and inputs.get("squeeze_mask", truth(0)).all(),
}


def ours(kind: str, inputs: Inputs) -> list[np.ndarray]:
    """What an operation of ours makes, from constants as a package would hold them."""
    definition = OPERATIONS[kind]
    definition.check(kind, inputs)
    held = {
        name: value if isinstance(value, str) else [mil.held(part) for part in value] if isinstance(value, list)
        else mil.held(np.asarray(value)) for name, value in inputs.items()
    }  # fmt: skip
    made = definition.function(**held)
    return made if isinstance(made, list) else [made]


def apples(kind: str, inputs: Inputs) -> list[Any]:
    """What coremltools infers; None where it infers nothing."""
    from coremltools.converters.mil.mil import Builder, Function

    with Function({"unused": Builder.placeholder((1,))}, opset_version=ct.target.iOS18):
        made = getattr(Builder, kind)(**inputs)
    return [var.val for var in made] if isinstance(made, list | tuple) else [made.val]


def halved(inputs: Inputs) -> Inputs:
    """The same inputs in fp16."""

    def half(value: Any) -> Any:
        if isinstance(value, list):
            return [half(part) for part in value]
        return value.astype(np.float16) if getattr(value, "dtype", None) == np.float32 else value

    return {name: half(value) for name, value in inputs.items()}


def close(made: np.ndarray, expected: Any, half: bool) -> None:
    """The same shape and values; the same type, as far as floating-point numbers go."""
    expected = np.asarray(expected)
    made = np.asarray(made)
    assert made.shape == expected.shape
    if expected.dtype.kind != "f":
        assert made.dtype.kind == expected.dtype.kind
        np.testing.assert_array_equal(made, expected)
    else:
        assert made.dtype == np.float32
        bound = 4e-3 if half else 2e-5
        np.testing.assert_allclose(made, expected.astype(np.float64), rtol=bound, atol=bound)


def test_there_are_cases_of_every_operation():
    assert CASES.keys() | DECODED == OPERATIONS.keys()
    assert TORCH.keys() | DECODED == OPERATIONS.keys()


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_operation_computes_what_apple_infers(kind, half):
    for inputs in map(halved, CASES[kind]) if half else CASES[kind]:
        if APPLES_FAULTS.get(kind, lambda inputs: False)(inputs):
            continue
        expected = apples(kind, inputs)
        assert (expected[0] is None) == (kind in NOT_INFERRED)
        for value, wanted in zip(ours(kind, inputs), expected, strict=True):
            if wanted is not None:
                close(value, wanted, half)


def t(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value))


def axes_of(inputs: Inputs) -> tuple[int, ...]:
    return tuple(inputs.get("axes", np.arange(inputs["x"].ndim)).tolist())


def reduced(compute: Any) -> Any:
    return lambda x, **rest: compute(t(x), dim=axes_of({"x": x, **rest}), keepdim=rest.get("keep_dims", False))


def product(x: np.ndarray, axes: Any = None, keep_dims: bool = False) -> torch.Tensor:
    result = t(x)
    for axis in sorted(axes_of({"x": x} if axes is None else {"x": x, "axes": axes}), reverse=True):
        result = result.prod(axis, keepdim=keep_dims, dtype=result.dtype)
    return result


def sliced(x: torch.Tensor, begin: Any, end: Any, stride: Any = None, begin_mask: Any = None, end_mask: Any = None,
           squeeze_mask: Any = None) -> torch.Tensor:  # fmt: skip
    """A view of the slice."""
    rank = x.ndim
    masks = [np.zeros(rank, bool) if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)]
    strides = np.ones(rank, int) if stride is None else stride
    return x[tuple(
        int(first) if single else slice(None if start else int(first), None if stop else int(last), int(step))
        for first, last, step, start, stop, single in zip(begin, end, strides, *masks, strict=True)
    )]  # fmt: skip


def updated(x: np.ndarray, update: np.ndarray, **place: Any) -> torch.Tensor:
    result = t(x)
    sliced(result, **place)[...] = t(update)
    return result


def gathered(x: np.ndarray, indices: Any, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False):
    indices, axis = t(np.asarray(indices).astype(np.int64)), axis % x.ndim
    if not batch_dims:
        flat = t(x).index_select(axis, indices.reshape(-1))
        return flat.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    rest = {"axis": axis - 1, "batch_dims": batch_dims - 1}
    return torch.stack([gathered(row, pick.numpy(), **rest) for row, pick in zip(x, indices, strict=True)])


def summed(x: np.ndarray, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> torch.Tensor:
    values = t(x).flip(axis) if reverse else t(x)
    total = values.cumsum(axis, dtype=values.dtype) - (values if exclusive else 0)
    return total.flip(axis) if reverse else total


def banded(x: np.ndarray, lower: int = -1, upper: int = -1) -> torch.Tensor:
    low = t(x) if upper < 0 else t(x).tril(upper)
    return low if lower < 0 else low.triu(-lower)


def hot(indices: np.ndarray, one_hot_vector_size: Any, axis: int = -1, on_value: Any = 1, off_value: Any = 0):
    chosen = F.one_hot(t(indices).long(), int(one_hot_vector_size)).movedim(-1, axis)
    values = torch.where(chosen.bool(), t(on_value), t(off_value))
    return values if values.is_floating_point() else values.int()


def padded(x: np.ndarray, pad: np.ndarray, mode: str = "constant", constant_val: float = 0.0) -> torch.Tensor:
    if mode == "constant":
        return F.pad(t(x), pad.reshape(-1, 2)[::-1].reshape(-1).tolist(), value=float(constant_val))
    return F.pad(t(x)[None], pad[-2:].tolist(), mode)[0]  # the last dimension alone


def interleaved(values: list[Any], axis: int, interleave: bool = False) -> torch.Tensor:
    parts = [t(value) for value in values]
    if not parts[0].ndim:
        return torch.stack(parts)
    if not interleave:
        return torch.cat(parts, axis)
    result = torch.cat(parts, axis).clone()
    for place, part in enumerate(parts):
        result.movedim(axis, 0)[place :: len(parts)] = part.movedim(axis, 0)
    return result


def both(compute: Any) -> Any:
    return lambda x, y: compute(t(x), t(y))


TORCH: dict[str, Any] = {
    **{kind: (lambda compute: lambda x: compute(t(x)))(getattr(torch, kind)) for kind in
       ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "relu", "round", "sigmoid", "sign", "sin", "sqrt",
        "square", "tanh", "logical_not")},
    **{kind: both(getattr(torch, name)) for kind, name in {
        "add": "add", "sub": "sub", "mul": "mul", "real_div": "div", "floor_div": "floor_divide", "mod": "remainder",
        "maximum": "maximum", "minimum": "minimum", "equal": "eq", "not_equal": "ne", "less": "lt",
        "less_equal": "le", "greater": "gt", "greater_equal": "ge", "logical_and": "logical_and",
        "logical_or": "logical_or", "logical_xor": "logical_xor", "pow": "pow"}.items()},
    "identity": lambda x: t(x),
    "silu": lambda x: F.silu(t(x)),
    "softplus": lambda x: F.softplus(t(x)),
    "log": lambda x, epsilon=0.0: torch.log(t(x) + epsilon),
    "rsqrt": lambda x, epsilon=0.0: torch.rsqrt(t(x) + epsilon),
    "inverse": lambda x, epsilon=1e-4: torch.reciprocal(t(x) + epsilon),
    "clip": lambda x, alpha, beta: t(x).clamp(float(alpha), float(beta)),
    "gelu": lambda x, mode="EXACT": t(x) * torch.sigmoid(1.702 * t(x)) if mode == "SIGMOID_APPROXIMATION" else F.gelu(
        t(x), approximate="none" if mode == "EXACT" else "tanh"),
    "cast": lambda x, dtype: t(x).to(torch.float32 if dtype.startswith("fp") else getattr(torch, dtype)),
    "select": lambda cond, a, b: torch.where(t(cond), t(a), t(b)),
    "reduce_sum": lambda x, **rest: reduced(torch.sum)(x, **rest).to(t(x).dtype),
    "reduce_mean": reduced(torch.mean),
    "reduce_sum_square": lambda x, **rest: reduced(torch.sum)(x * x, **rest).to(t(x).dtype),
    "reduce_l2_norm": reduced(torch.linalg.vector_norm),
    "reduce_max": reduced(torch.amax),
    "reduce_min": reduced(torch.amin),
    "reduce_prod": product,
    "reduce_argmax": lambda x, axis=-1, keep_dims=False: t(x).argmax(axis, keep_dims),
    "reduce_argmin": lambda x, axis=-1, keep_dims=False: t(x).argmin(axis, keep_dims),
    "cumsum": summed,
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: torch.matmul(
        t(x).mT if transpose_x else t(x), t(y).mT if transpose_y else t(y)),
    "linear": lambda x, weight, bias=None: t(x) @ t(weight).T + (0 if bias is None else t(bias)),
    "softmax": lambda x, axis=-1: F.softmax(t(x), axis),
    "scaled_dot_product_attention": lambda query, key, value, attn_mask=None: F.scaled_dot_product_attention(
        t(query), t(key), t(value), None if attn_mask is None else t(attn_mask)),
    "layer_norm": lambda x, axes, gamma=None, beta=None, epsilon=1e-5: F.layer_norm(
        t(x), [x.shape[axis] for axis in axes], *(None if w is None else t(w) for w in (gamma, beta)), float(epsilon)
    ) if axes.tolist() != [0] else F.layer_norm(t(x).T, [x.shape[0]], eps=float(epsilon)).T,
    "gather": gathered,
    "gather_along_axis": lambda x, indices, axis=0: torch.take_along_dim(t(x), t(indices).long(), axis),
    "slice_by_index": lambda x, **place: sliced(t(x), **place),
    "slice_by_size": lambda x, begin, size: sliced(
        t(x), begin, np.where(size < 0, np.array(x.shape), begin + size)),
    "slice_update": updated,
    "concat": interleaved,
    "stack": lambda values, axis: torch.stack([t(value) for value in values], axis),
    "split": lambda x, axis, num_splits=None, split_sizes=None: list(
        t(x).chunk(num_splits, axis) if split_sizes is None else t(x).split(split_sizes.tolist(), axis)),
    "reshape": lambda x, shape: t(x).reshape({(2, -1, 0): (2, -1, 6), (1, 0, -1, 0): (1, 1, 2, 50)}.get(
        tuple(shape.tolist()), shape.tolist())),
    "expand_dims": lambda x, axes: t(x)[:, None, :, None] if len(axes) == 2 else t(x).unsqueeze(int(axes[0])),
    "squeeze": lambda x, axes=None: t(x).squeeze() if axes is None else t(x).squeeze(tuple(axes.tolist())),
    "transpose": lambda x, perm: t(x).permute(*perm.tolist()),
    "tile": lambda x, reps: t(x).tile(reps.tolist()),
    "reverse": lambda x, axes=None: t(x).flip(axes_of({"x": x} if axes is None else {"x": x, "axes": axes})),
    "pad": padded,
    "shape": lambda x: torch.tensor(t(x).shape, dtype=torch.int32),
    "range_1d": lambda start, end, step: torch.arange(start, end, step, dtype=t(start).dtype),
    "fill": lambda shape, value: torch.full(shape.tolist(), value, dtype=t(value).dtype),
    "fill_like": lambda ref_tensor, value: torch.full_like(t(ref_tensor), value, dtype=t(value).dtype),
    "band_part": banded,
    "one_hot": hot,
}  # fmt: skip


@pytest.mark.parametrize("kind", TORCH)
def test_an_operation_computes_what_torch_computes(kind):
    for inputs in CASES[kind]:
        expected = TORCH[kind](**inputs)
        expected = expected if isinstance(expected, list) else [expected]
        with np.errstate(all="ignore"):
            for value, wanted in zip(ours(kind, inputs), expected, strict=True):
                close(value, wanted.numpy(), half=False)


FAULTS = [
    ("gather", {"x": real(5), "indices": i32(-1)}, "indices of -1 to -1 into 5 entries"),
    ("gather", {"x": real(5), "indices": i32(5), "validate_indices": False}, "indices of 5 to 5 into 5"),
    ("gather", {"x": real(5), "indices": i32(0), "axis": 1}, "axis 1 of a value of rank 1"),
    ("gather_along_axis", {"x": real(4, 3), "indices": i32(0)}, r"indices are of shape \(1,\)"),
    ("slice_by_index", {"x": real(4), "begin": i32(0), "end": i32(5)}, "entries 0 to 5 in steps of 1, of 4"),
    ("slice_by_index", {"x": real(4), "begin": i32(3), "end": i32(2)}, "entries 3 to 2"),
    ("slice_by_index", {"x": real(4), "begin": i32(-5), "end": i32(2)}, "entries -1 to 2"),
    ("slice_by_index", {"x": real(4), "begin": i32(3), "end": i32(0), "stride": i32(-1)}, "steps of -1"),
    ("slice_by_index", {"x": real(4), "begin": i32(4), "end": i32(5), "squeeze_mask": truth(1)}, "index 4 of 4"),
    ("slice_by_index", {"x": real(4, 4), "begin": i32(0), "end": i32(1)}, "not of rank 2"),
    ("slice_by_size", {"x": real(4), "begin": i32(2), "size": i32(3)}, "entries 2 to 5"),
    ("slice_update", {"x": real(4, 5), "update": real(5, 4), "begin": i32(0, 0), "end": i32(4, 5)}, "the update is"),
    ("slice_update", {"x": real(4, 5), "update": real(1, 5), "begin": i32(0, 0), "end": i32(4, 5)}, "the update is"),
    ("concat", {"values": [real(2, 3), whole(2, 3)], "axis": 0}, "its values are float32"),
    ("concat", {"values": [real(2, 3), real(1, 3)], "axis": 0, "interleave": True}, "same shape"),
    ("split", {"x": real(5), "axis": 0, "split_sizes": i32(2, 2)}, "5 entries are divided into"),
    ("split", {"x": real(5), "axis": 0, "num_splits": 2}, "not divided evenly"),
    ("one_hot", {"indices": i32(4), "one_hot_vector_size": np.int32(4)}, "into 4 entries"),
    ("softmax", {"x": np.full((2, 3), -np.inf, np.float32)}, "sees nothing"),
    ("scaled_dot_product_attention", {"query": real(1, 2, 4), "key": real(1, 3, 4), "value": real(1, 3, 4),
     "attn_mask": np.array([[True, True, True], [False, False, False]])}, "sees nothing"),
    ("scaled_dot_product_attention", {"query": real(1, 4, 2, 4), "key": real(1, 2, 3, 4), "value": real(1, 2, 3, 4)},
     "different batches"),
    ("scaled_dot_product_attention", {"query": real(1, 1, 4), "key": real(1, 3, 4), "value": real(1, 3, 4),
     "attn_mask": real(1, 2, 3)}, "more than the queries"),
    ("gelu", {"x": real(3), "mode": "QUICK"}, "its mode is QUICK"),
    ("cast", {"x": np.float32(np.nan), "dtype": "int32"}, "does not hold"),
    ("cast", {"x": i32(40_000), "dtype": "int16"}, "int16 does not hold its values of 40000"),
    ("cast", {"x": np.float32(2**31), "dtype": "int32"}, "int32 does not hold its values of 2147483648"),
    ("cast", {"x": real(3), "dtype": "int4"}, "not known here"),
    ("add", {"x": real(3), "y": whole(3)}, "x is float32 and y int32"),
    ("real_div", {"x": whole(3), "y": whole(3)}, "not defined for int32"),
    ("mod", {"x": whole(3), "y": i32(0, 1, 2)}, "by zero"),
    ("floor_div", {"x": whole(3), "y": i32(0, 1, 2)}, "by zero"),
    ("reduce_mean", {"x": whole(3)}, "defined for floating-point"),
    ("tile", {"x": real(3), "reps": i32(0)}, "it repeats"),
    ("pad", {"x": real(3), "pad": i32(3, 0), "mode": "reflect"}, "it reflects"),
    ("matmul", {"x": real(3), "y": real(3), "transpose_x": True}, "transposes a vector"),
    ("layer_norm", {"x": real(2, 3), "axes": i32(-1), "gamma": real(2)}, "gamma is of shape"),
    ("range_1d", {"start": np.int32(0), "end": np.int32(3), "step": np.int32(0)}, "in steps of 0"),
    ("constexpr_blockwise_shift_scale", {"data": real(4, 3), "scale": real(3, 1)}, "do not divide"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "inputs", "message"), FAULTS)
def test_what_has_no_defined_result_is_refused(kind, inputs, message):
    with pytest.raises(ValueError, match=message):
        ours(kind, inputs)


def test_the_lowest_whole_number_can_be_cast_to():
    assert ours("cast", {"x": np.float32(-(2**31)), "dtype": "int32"}) == [-(2**31)]


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("gather", {"x": real(3), "indices": i32(0), "mode": "clip"}, "gather has an input .*: mode"),
        ("linear", {"x": real(3), "weight": real(3, 3), "half": True}, "linear has an input .*: half"),
        ("linear", {"x": real(3)}, "linear lacks its input weight"),
        ("constexpr_lut_to_dense", {"indices": i32(0), "lut": real(2), "shape": i32(2)}, "shape"),
    ],
)
def test_an_input_that_is_not_known_is_refused(kind, inputs, message):
    with pytest.raises(UnknownOperation, match=message):
        ours(kind, inputs)


@pytest.mark.parametrize("kind", [kind for kind, definition in OPERATIONS.items() if definition.sums])
def test_sums_in_half_precision_are_near_and_no_better(kind):
    exact, rough = 0.0, 0.0
    for inputs in CASES[kind]:
        inputs = halved(inputs)
        held = {name: mil.held(np.asarray(value)) for name, value in inputs.items()}
        if any(value.dtype == np.int32 and name in ("x", "query") for name, value in held.items()):
            continue
        with np.errstate(all="ignore"):
            wide, half = (np.asarray(OPERATIONS[kind].function(**held, **more)) for more in ({}, {"half": True}))
        np.testing.assert_allclose(half, wide, rtol=2e-2, atol=2e-2)
        exact, rough = max(exact, np.abs(half - wide).max()), rough + half.size
    assert rough and exact > 0


def test_a_sum_in_half_precision_stops_where_its_next_term_is_lost():
    ones = np.ones((1, 4096), np.float32)
    for kind, inputs in (("reduce_sum", {"x": ones}), ("linear", {"x": ones, "weight": ones}),
                         ("matmul", {"x": ones, "y": ones.T})):  # fmt: skip
        function = OPERATIONS[kind].function
        assert float(np.asarray(function(**inputs)).item()) == 4096
        assert float(np.asarray(function(**inputs, half=True)).item()) == 2048


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Path:
    """A package that holds constants stored in each way that there is."""
    from coremltools.converters.mil.mil import Builder, types

    def stored(dtype: Any, low: int, high: int, *shape: int) -> np.ndarray:
        return _random.integers(low, high, shape).astype(types.nptype_from_builtin(dtype))

    def scales(*shape: int) -> np.ndarray:
        return positive(*shape).astype(np.float16)

    shift, table = Builder.constexpr_blockwise_shift_scale, Builder.constexpr_lut_to_dense

    @Builder.program(input_specs=[Builder.TensorSpec((1,))], opset_version=ct.target.iOS18)
    def holder(x):
        constants = [
            shift(data=stored(types.int8, -128, 128, 12, 7), scale=scales(12, 1), name="int8_channels"),
            shift(data=stored(types.uint8, 0, 256, 12, 7), scale=scales(12, 1),
                  offset=stored(types.uint8, 0, 256, 12, 1), name="uint8_offset"),
            shift(data=stored(types.int4, -8, 8, 9, 32), scale=scales(9, 4), name="int4_blocks"),
            shift(data=stored(types.int4, -8, 8, 13, 1), scale=scales(1, 1), name="int4_odd"),
            shift(data=stored(types.uint4, 0, 16, 6, 32), scale=scales(3, 4),
                  offset=stored(types.uint4, 0, 16, 3, 4), name="uint4_blocks"),
            shift(data=stored(types.int8, -128, 128, 5, 3), scale=real(1, 3), name="fp32_scale"),
            *(table(indices=stored(dtype, 0, 2**bits, 6, 5), lut=real(3, 1, 2**bits, 1).astype(np.float16),
                    name=f"palette_{bits}") for bits, dtype in
              {1: types.uint1, 2: types.uint2, 3: types.uint3, 4: types.uint4, 6: types.uint6, 8: types.uint8}.items()),
            shift(data=table(indices=stored(types.uint4, 0, 16, 6, 5), lut=stored(types.int8, -128, 128, 2, 1, 16, 1)),
                  scale=scales(6, 1), name="palette_of_integers"),
            table(indices=stored(types.uint2, 0, 4, 6, 5), lut=real(2, 1, 4, 3).astype(np.float16),
                  vector_axis=np.int32(0), name="vectors"),
            Builder.constexpr_affine_dequantize(
                quantized_data=stored(types.int8, -128, 128, 4, 5), zero_point=stored(types.int8, -9, 9, 5),
                scale=scales(5), axis=np.int32(-1), name="affine"),
            Builder.constexpr_affine_dequantize(
                quantized_data=stored(types.uint8, 0, 255, 4, 5), zero_point=np.uint8(3), scale=np.float16(0.25),
                axis=np.int32(0), name="affine_scalar"),
            Builder.constexpr_cast(source_val=scales(4, 5), output_dtype="fp32", name="widened"),
        ]  # fmt: skip
        # All are used, or they would be left out
        parts = [Builder.cast(x=Builder.reduce_sum(x=constant), dtype="fp32") for constant in constants]
        return Builder.concat(values=[Builder.reshape(x=part, shape=i32(1)) for part in parts], axis=0, name="sums")

    path = tmp_path_factory.mktemp("compressed") / "model.mlpackage"
    ct.convert(
        holder, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, pass_pipeline=ct.PassPipeline.EMPTY,
        compute_precision=ct.precision.FLOAT32,
    ).save(str(path))  # fmt: skip
    return path


def loaded(path: Path, change: Any = lambda specification: None) -> Any:
    """The package at `path` as coremltools loads it back, after `change` of its protobuf."""
    from coremltools.converters.mil.frontend.milproto.load import load

    specification = ct.utils.load_spec(str(path))
    change(specification)
    return load(specification, specification.specificationVersion, str(path / small_gpt.DATA / "weights"))


def test_constants_are_decoded_as_coremltools_decodes_them(compressed):
    package = mil.Package(compressed)
    found = {}
    for operation in loaded(compressed).functions["main"].operations:
        if operation.op_type.startswith("constexpr_"):
            found[operation.outputs[0].name] = operation.materialized_val_inference()
    assert len(found) == 18
    types = package.program.types()
    for name, expected in found.items():
        value = package.constant(name)
        assert types[name].dtype == {"float16": "fp16", "float32": "fp32"}.get(str(expected.dtype), "int8"), name
        assert value.dtype == (np.int8 if expected.dtype == np.int8 else np.float32), name
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert package.findings.problems() == []


def test_all_ways_of_storing_are_in_weight_bin(compressed):
    kinds = {value.type.dtype for operation in program.read(compressed).operations for (value, *_) in
             operation.inputs.values() if not isinstance(value, str) and math.prod(value.type.shape) > 9}  # fmt: skip
    assert {"int8", "uint8", "int4", "uint4", "uint1", "uint2", "uint3", "uint6", "fp16"} <= kinds


def made_constant(ids: list[int], caches: dict[str, np.ndarray]) -> Any:
    """A change of a package's protobuf that gives it its inputs and states as constants, and makes what it writes to
    its states outputs."""

    def const(name: str, value: np.ndarray) -> Any:
        from coremltools.converters.mil.backend.mil.helper import create_immediate_value
        from coremltools.proto import MIL_pb2

        message = MIL_pb2.Operation(type="const")
        message.outputs.add(name=name)
        constant = create_immediate_value_of(value, create_immediate_value)
        message.outputs[0].type.CopyFrom(constant.type)
        message.attributes["val"].CopyFrom(constant)
        message.attributes["name"].type.tensorType.dataType = MIL_pb2.STRING
        message.attributes["name"].immediateValue.tensor.strings.values.append(name)
        return message

    def change(specification: Any) -> None:
        function = specification.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        kept = [const("inputIds", np.array([ids], np.int32))]
        for operation in block.operations:
            if operation.type == "read_state":
                kept.append(const(operation.outputs[0].name, caches[operation.inputs["input"].arguments[0].name]))
            elif operation.type == "write_state":
                block.outputs.append(operation.inputs["data"].arguments[0].name)
            else:
                kept.append(operation)
        copies = [type(operation).FromString(operation.SerializeToString()) for operation in kept]
        del block.operations[:], function.inputs[:]
        block.operations.extend(copies)

    return change


def create_immediate_value_of(value: np.ndarray, create: Any) -> Any:
    """`value` as the protobuf holds it: the helper of coremltools takes a variable."""
    from coremltools.converters.mil.mil import Builder, Function

    with Function({"unused": Builder.placeholder((1,))}, opset_version=ct.target.iOS18):
        return create(Builder.const(val=value))


@pytest.fixture
def plain_keep_dims(monkeypatch):
    """coremltools loads keep_dims as a bool of numpy, which numpy's own reductions take no more since 2.4."""
    from coremltools.converters.mil.mil.ops.defs.iOS15.reduction import ReductionAxes

    infer = ReductionAxes.value_inference

    def value_inference(self):
        compute = self.get_operator()
        self.get_operator = lambda: lambda x, axis, keepdims: compute(x, axis=axis, keepdims=bool(keepdims))
        return infer(self)

    monkeypatch.setattr(ReductionAxes, "value_inference", value_inference)


@pytest.mark.usefixtures("plain_keep_dims")
@pytest.mark.filterwarnings("ignore")
def test_a_whole_package_computes_what_coremltools_infers(tmp_path):
    path = small_gpt.convert(small_gpt.build(True, F.gelu), tmp_path / "model.mlpackage")
    package = mil.Package(path, "fp16")  # as coremltools infers
    state = package.new_state()
    for ids in ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3]):
        before = {name: value.astype(np.float16) for name, value in state.items()}
        made = package.predict({"inputIds": [ids]}, state)["logits"]
        inferred = loaded(path, made_constant(ids, before)).functions["main"].outputs
        logits, *written = [var.val for var in inferred]
        np.testing.assert_allclose(made, logits.astype(np.float32), rtol=2e-3, atol=0.02)
        assert np.abs(logits).max() > 3
        assert len(written) == 2
        for value, expected in zip(state.values(), written, strict=True):
            np.testing.assert_allclose(value, expected.astype(np.float32), atol=0.005)
    assert package.findings.problems() == []
