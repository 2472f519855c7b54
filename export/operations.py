"""What each operation of Apple's intermediate language (MIL) computes, in numpy; torch where that is faster.

`OPERATIONS` holds them by name. An operation's positional parameters are the inputs that it reads, by the names that
MIL gives them, with MIL's defaults (operations of iOS 17 and 18: "CoreML7" and later). What is not here is refused by
whoever runs a program: an unknown operation or an unknown input must not pass for a known one. Where MIL leaves open
what comes out (an index outside, a row of attention that sees nothing, a slice past the end), where numpy would give
something, and devices perhaps something else, an operation here raises `OperationFault`.

Numbers: floating-point values are float32 arrays, whatever MIL declares them to be, whole numbers are arrays of their
own type. Sums are taken in float32, or with `half=True` in float16, one term after the other: the worst order that a
device could choose.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from export.program import OperationFault, UnknownOperation

Array = np.ndarray

_ZERO, _ON, _OFF = np.float32(0), np.int32(1), np.int32(0)  # defaults of values whose type is that of a result


@dataclasses.dataclass(frozen=True)
class Definition:
    """An operation and what it is called with.

    Attributes:
        function: takes its inputs by name; returns an array, or a list of them.
        required, optional: names of its inputs.
        tuples: those that are sequences of arrays.
        sums: whether it takes `half`.
        moves: whether it only moves numbers and makes none.
        constant: whether it may only depend on constants.
    """

    function: Callable[..., Any]
    required: frozenset[str]
    optional: frozenset[str]
    tuples: frozenset[str]
    sums: bool
    moves: bool
    constant: bool

    def check(self, kind: str, given: Sequence[str]) -> None:
        """Refuse inputs that it does not read, or lacks.

        Raises:
            UnknownOperation: there are some.
        """
        if unknown := set(given) - self.required - self.optional:
            raise UnknownOperation(f"{kind} has an input that is not known here: {', '.join(sorted(unknown))}")
        if missing := self.required - set(given):
            raise UnknownOperation(f"{kind} lacks its input {', '.join(sorted(missing))}")


OPERATIONS: dict[str, Definition] = {}


def _operation(
    *kinds: str, tuples: Sequence[str] = (), moves: bool = False, constant: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table, under its own name if no other is given."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        inputs = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
        required = frozenset(parameter.name for parameter in inputs if parameter.default is parameter.empty)
        optional = frozenset(parameter.name for parameter in inputs) - required
        sums = any(parameter.name == "half" for parameter in parameters)
        definition = Definition(function, required, optional, frozenset(tuples), sums, moves, constant)
        OPERATIONS.update(dict.fromkeys(kinds or (function.__name__,), definition))
        return function

    return enter


def _tensor(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def _is_float(x: Array) -> bool:
    return x.dtype == np.float32


def _need_float(x: Array) -> None:
    if not _is_float(x):
        raise OperationFault(f"it is defined for floating-point numbers, here are {x.dtype}")


# Elementwise, of one value


def _unary(kind: str, compute: Callable[[Array], Array], of: str = "f") -> None:
    """Enter an operation of the single input x, which may be of these kinds of numpy's."""

    def function(x):
        if x.dtype.kind not in of:
            raise OperationFault(f"it is not defined for {x.dtype}")
        return compute(x)

    _operation(kind)(function)


def _with_torch(compute: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Array], Array]:
    return lambda x: compute(_tensor(x)).numpy().reshape(x.shape)


_unary("abs", np.abs, "fi")
_unary("ceil", np.ceil)
_unary("cos", np.cos)
_unary("erf", _with_torch(torch.erf))
_unary("exp", np.exp)
_unary("exp2", np.exp2)
_unary("floor", np.floor)
_unary("logical_not", np.logical_not, "b")
_unary("relu", lambda x: np.maximum(x, np.float32(0)))
_unary("round", np.rint)
_unary("sigmoid", _with_torch(torch.sigmoid))
_unary("sign", np.sign, "fi")
_unary("silu", _with_torch(F.silu))
_unary("sin", np.sin)
_unary("softplus", _with_torch(lambda x: torch.logaddexp(x, torch.zeros(()))))
_unary("sqrt", np.sqrt)
_unary("square", np.square, "fi")
_unary("tanh", np.tanh)


@_operation(moves=True)
def identity(x):
    return x


@_operation()
def log(x, epsilon=1e-45):
    _need_float(x)
    return np.log(x + epsilon)


@_operation()
def rsqrt(x, epsilon=1e-12):
    _need_float(x)
    return np.float32(1) / np.sqrt(x + epsilon)


@_operation()
def inverse(x, epsilon=1e-4):
    _need_float(x)
    return np.float32(1) / (x + epsilon)


@_operation()
def clip(x, alpha, beta):
    _need_float(x)
    return np.minimum(np.maximum(x, alpha), beta)


_GELU = {
    "EXACT": F.gelu,
    "TANH_APPROXIMATION": functools.partial(F.gelu, approximate="tanh"),
    "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
}


@_operation()
def gelu(x, mode="EXACT"):
    _need_float(x)
    if mode not in _GELU:
        raise OperationFault(f"its mode is {mode}: one of {', '.join(_GELU)} is known")
    return _with_torch(_GELU[mode])(x)


_INTEGERS = {"int8", "uint8", "int16", "uint16", "int32"}


@_operation()
def cast(x, dtype):
    if dtype in ("fp16", "fp32"):
        return x.astype(np.float32)
    if dtype == "bool":
        return x != 0
    if dtype not in _INTEGERS:
        raise OperationFault(f"it casts to {dtype}, which is not known here")
    limits = np.iinfo(dtype)
    if x.size and x.dtype.kind in "fiu" and not np.can_cast(x.dtype, dtype):
        low, high = float(x.min()), float(x.max())
        if not (low > limits.min - 1.0 and high < limits.max + 1.0):  # so that NaN is none either
            raise OperationFault(f"{dtype} does not hold its values of {low} to {high}")
    return x.astype(dtype)


# Elementwise, of two


def _binary(kind: str, compute: Callable[[Array, Array], Array], of: str = "fi") -> None:
    """Enter an operation of x and y, broadcast, which are of one type."""

    def function(x, y):
        if x.dtype != y.dtype:
            raise OperationFault(f"x is {x.dtype} and y {y.dtype}")
        if x.dtype.kind not in of:
            raise OperationFault(f"it is not defined for {x.dtype}")
        return compute(x, y)

    _operation(kind)(function)


def _without_zero(compute: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def checked(x, y):
        if not _is_float(y) and not y.all():
            raise OperationFault("it divides whole numbers by zero")
        return compute(x, y)

    return checked


def _power(x: Array, y: Array) -> Array:
    if not _is_float(y) and (y < 0).any():
        raise OperationFault("it raises whole numbers to a negative power")
    return x**y


_binary("add", np.add)
_binary("sub", np.subtract)
_binary("mul", np.multiply)
_binary("real_div", np.divide, "f")
_binary("floor_div", _without_zero(np.floor_divide))
_binary("mod", _without_zero(np.mod))
_binary("pow", _power)
_binary("maximum", np.maximum)
_binary("minimum", np.minimum)
_binary("equal", np.equal)
_binary("not_equal", np.not_equal)
_binary("less", np.less)
_binary("less_equal", np.less_equal)
_binary("greater", np.greater)
_binary("greater_equal", np.greater_equal)
_binary("logical_and", np.logical_and, "b")
_binary("logical_or", np.logical_or, "b")
_binary("logical_xor", np.logical_xor, "b")


@_operation(moves=True)
def select(cond, a, b):
    if cond.dtype != np.bool_ or a.dtype != b.dtype:
        raise OperationFault(f"cond is {cond.dtype}, a {a.dtype} and b {b.dtype}")
    return np.where(cond, a, b)


# Sums and the like


def rounded(x: Array) -> Array:
    """`x`, which is float32, rounded to what fp16 holds."""
    if x.size < 512:  # below, torch takes longer to begin than numpy takes
        return x.astype(np.float16).astype(np.float32)
    return torch.from_numpy(x).half().float().numpy()


def _half_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [..., m, k] @ y [..., k, n], each sum in float16: it is rounded after every term."""
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    total = torch.zeros(*batch, x.shape[-2], y.shape[-1], dtype=torch.float16)
    columns, rows = x.half().unsqueeze(-1).unbind(-2), y.half().unsqueeze(-2).unbind(-3)
    for column, row in zip(columns, rows, strict=True):  # [..., m, 1], [..., 1, n]
        total.addcmul_(column, row)
    return total.float()


def _half_sum(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum of `x` over `axes`, which stay with length 1, rounded to float16 after every term."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    flat = np.transpose(x, [*kept, *axes]).reshape(*(x.shape[axis] for axis in kept), 1, -1)
    total = _half_product(_tensor(flat), torch.ones(flat.shape[-1], 1)).numpy()
    return total.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _axes(axes: Array | None, rank: int) -> tuple[int, ...]:
    """As non-negative numbers; None is all of them."""
    if axes is None:
        return tuple(range(rank))
    return tuple(_axis(axis, rank) for axis in np.atleast_1d(axes))


def _axis(axis: Any, rank: int) -> int:
    axis = int(axis)
    if not -rank <= axis < rank:
        raise OperationFault(f"axis {axis} of a value of rank {rank}")
    return axis % rank


def _shape_without(x: Array, axes: tuple[int, ...], keep: Any) -> tuple[int, ...]:
    """What the shape is when `axes` are reduced."""
    if keep:
        return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    return tuple(size for axis, size in enumerate(x.shape) if axis not in axes)


@_operation()
def reduce_sum(x, axes=None, keep_dims=False, *, half=False):
    axes = _axes(axes, x.ndim)
    total = _half_sum(x, axes) if half else x.sum(axis=axes, keepdims=True, dtype=x.dtype)
    return total.reshape(_shape_without(x, axes, keep_dims))


@_operation()
def reduce_mean(x, axes=None, keep_dims=False, *, half=False):
    _need_float(x)
    axes = _axes(axes, x.ndim)
    count = np.float32(math.prod(x.shape[axis] for axis in axes))
    return reduce_sum(x, np.array(axes), keep_dims, half=half) / count


@_operation()
def reduce_sum_square(x, axes=None, keep_dims=False, *, half=False):
    return reduce_sum(rounded(np.square(x)) if half else np.square(x), axes, keep_dims, half=half)


@_operation()
def reduce_l2_norm(x, axes=None, keep_dims=False, *, half=False):
    _need_float(x)
    return np.sqrt(reduce_sum_square(x, axes, keep_dims, half=half))


def _extreme(kind: str, compute: Callable[..., Array]) -> None:
    def function(x, axes=None, keep_dims=False):
        axes = _axes(axes, x.ndim)
        return compute(x, axis=axes, keepdims=True).reshape(_shape_without(x, axes, keep_dims))

    _operation(kind)(function)


_extreme("reduce_max", np.max)
_extreme("reduce_min", np.min)


@_operation()
def reduce_prod(x, axes=None, keep_dims=False):
    axes = _axes(axes, x.ndim)
    return x.prod(axis=axes, keepdims=True, dtype=x.dtype).reshape(_shape_without(x, axes, keep_dims))


def _position(kind: str, compute: Callable[..., Array]) -> None:
    def function(x, axis=-1, keep_dims=False):
        axes = (_axis(axis, x.ndim),)
        return compute(x, axis=axes[0]).astype(np.int32).reshape(_shape_without(x, axes, keep_dims))

    _operation(kind)(function)


_position("reduce_argmax", np.argmax)
_position("reduce_argmin", np.argmin)


@_operation()
def cumsum(x, axis=0, exclusive=False, reverse=False, *, half=False):
    axis = _axis(axis, x.ndim)
    values = np.flip(x, axis) if reverse else x
    total = np.cumsum(values, axis=axis, dtype=np.float16 if half else x.dtype).astype(x.dtype)
    if exclusive:
        before = np.roll(total, 1, axis)
        before[(slice(None),) * axis + (slice(0, 1),)] = 0
        total = before
    return np.ascontiguousarray(np.flip(total, axis)) if reverse else total


@_operation()
def matmul(x, y, transpose_x=False, transpose_y=False, *, half=False):
    if x.dtype != y.dtype:
        raise OperationFault(f"x is {x.dtype} and y {y.dtype}")
    if (transpose_x and x.ndim < 2) or (transpose_y and y.ndim < 2):
        raise OperationFault("it transposes a vector")
    x = x.swapaxes(-1, -2) if transpose_x else x
    y = y.swapaxes(-1, -2) if transpose_y else y
    if not _is_float(x):
        return np.matmul(x, y)
    left, right = torch.from_numpy(x), torch.from_numpy(y)
    if not half:
        return torch.matmul(left, right).numpy()
    matrices = _half_product(left[None] if x.ndim == 1 else left, right[:, None] if y.ndim == 1 else right)
    matrices = matrices.squeeze(-2) if x.ndim == 1 else matrices
    return (matrices.squeeze(-1) if y.ndim == 1 else matrices).numpy()


@_operation()
def linear(x, weight, bias=None, *, half=False):
    if not _is_float(x):
        product = np.matmul(x, weight.T)
        return product if bias is None else product + bias
    added = None if bias is None else torch.from_numpy(bias)
    if not half:
        return F.linear(torch.from_numpy(x), torch.from_numpy(weight), added).numpy()
    rows = torch.from_numpy(x).reshape(-1, x.shape[-1])
    product = _half_product(rows, torch.from_numpy(weight).T.contiguous())
    return (product if added is None else product + added).reshape(*x.shape[:-1], -1).numpy()


def _refuse_unseeing(largest: Array) -> None:
    """Where the largest of what a row may see is -inf, it sees nothing: 0 / 0 here, and there who knows."""
    if np.isneginf(largest).any():
        raise OperationFault("a row sees nothing: all of it is masked")


def _softmax(x: Array, axis: int, half: bool) -> Array:
    if not half:
        return torch.softmax(_tensor(x), axis).numpy()
    powers = rounded(np.exp(rounded(x - x.max(axis=axis, keepdims=True))))
    return powers / _half_sum(powers, (axis,))


@_operation()
def softmax(x, axis=-1, *, half=False):
    _need_float(x)
    axis = _axis(axis, x.ndim)
    _refuse_unseeing(x.max(axis=axis))
    return _softmax(x, axis, half)


@_operation()
def scaled_dot_product_attention(query, key, value, attn_mask=None, *, half=False):
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2] or query.ndim < 3:
        raise OperationFault(f"query {query.shape}, key {key.shape} and value {value.shape} are of different batches")
    if key.shape[-2] != value.shape[-2]:
        raise OperationFault(f"there are {key.shape[-2]} keys and {value.shape[-2]} values")
    if attn_mask is not None:
        if attn_mask.shape[-1] != key.shape[-2]:
            raise OperationFault(f"the mask is for {attn_mask.shape[-1]} keys, there are {key.shape[-2]}")
        if attn_mask.dtype == np.bool_:
            attn_mask = np.where(attn_mask, np.float32(0), np.float32(-np.inf))
        _refuse_unseeing(attn_mask.max(axis=-1))
        if np.broadcast_shapes(attn_mask.shape[:-1], query.shape[:-1]) != query.shape[:-1]:
            raise OperationFault(f"the mask {attn_mask.shape} is for more than the queries {query.shape}")
    queries, keys, values = torch.from_numpy(query), torch.from_numpy(key), torch.from_numpy(value)
    scale = 1 / math.sqrt(query.shape[-1])
    if half:
        scores = rounded(_half_product(queries, keys.transpose(-1, -2)).numpy() * np.float32(scale))
        scores = scores if attn_mask is None else rounded(scores + attn_mask)
        weights = rounded(_softmax(scores, scores.ndim - 1, True))
        return _half_product(torch.from_numpy(weights), values).numpy()
    scores = torch.matmul(queries * scale, keys.transpose(-1, -2))
    scores = scores if attn_mask is None else scores + torch.from_numpy(attn_mask)
    return torch.matmul(torch.softmax(scores, -1), values).numpy()


@_operation()
def layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5, *, half=False):
    _need_float(x)
    axes = _axes(axes, x.ndim)
    kept = rounded if half else (lambda value: value)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    over = np.array(axes)
    centred = kept(x - kept(reduce_mean(x, over, True, half=half)))
    variance = kept(reduce_mean(kept(np.square(centred)), over, True, half=half))
    result = centred / np.sqrt(variance + epsilon)
    for name, given in (("gamma", gamma), ("beta", beta)):
        if given is not None and given.shape != tuple(x.shape[axis] for axis in sorted(axes)):
            raise OperationFault(f"{name} is of shape {given.shape}, x is normalised over {axes} of {x.shape}")
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


# Indices and shapes


def _within(indices: Array, size: int) -> None:
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise OperationFault(f"indices of {indices.min()} to {indices.max()} into {size} entries")


@_operation()
def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    axis, batch = _axis(axis, x.ndim), int(batch_dims)
    # Without validate_indices too: then what lies outside is undefined, and so are negative ones since iOS 17
    _within(indices, x.shape[axis])
    if not batch:
        return np.take(x, indices, axis)
    if batch > axis or x.shape[:batch] != indices.shape[:batch]:
        raise OperationFault(f"{batch} batch dimensions of x {x.shape} and indices {indices.shape}, axis {axis}")
    rows, picks = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
    taken = np.stack([np.take(row, pick, axis - batch) for row, pick in zip(rows, picks, strict=True)])
    return taken.reshape(*x.shape[:batch], *taken.shape[1:])


@_operation()
def gather_along_axis(x, indices, axis=0, validate_indices=False):
    axis = _axis(axis, x.ndim)
    _within(indices, x.shape[axis])
    beside = [size for place, size in enumerate(x.shape) if place != axis]
    if indices.ndim != x.ndim or beside != [size for place, size in enumerate(indices.shape) if place != axis]:
        raise OperationFault(f"indices are of shape {indices.shape}, x of {x.shape}, axis {axis}")
    return np.take_along_axis(x, indices.astype(np.int64), axis)


def _places(
    shape: tuple[int, ...], begin: Array, end: Array, stride: Array | None, begin_mask: Array | None,
    end_mask: Array | None, squeeze_mask: Array | None,
) -> tuple[int | slice, ...]:  # fmt: skip
    """The index that a slice of a value of `shape` is, refused where it does not lie within."""
    rank = len(shape)
    nothing = (False,) * rank
    masks = [nothing if mask is None else mask.tolist() for mask in (begin_mask, end_mask, squeeze_mask)]
    strides = (1,) * rank if stride is None else stride.tolist()
    given = (begin.tolist(), end.tolist(), strides, *masks)
    if any(len(values) != rank for values in given):
        raise OperationFault(f"its begin, end, stride and masks are not of rank {rank}")
    index = []
    for size, first, last, step, from_start, to_end, single in zip(shape, *given, strict=True):
        first = 0 if from_start else first + size if first < 0 else first
        if single:
            if not 0 <= first < size:
                raise OperationFault(f"index {first} of {size} entries")
            index.append(first)
            continue
        last = size if to_end else last + size if last < 0 else last
        if not (0 <= first <= last <= size and step > 0):
            raise OperationFault(f"entries {first} to {last} in steps of {step}, of {size} entries")
        index.append(slice(first, last, step))
    return tuple(index)


@_operation(moves=True)
def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    return x[_places(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@_operation(moves=True)
def slice_by_size(x, begin, size):
    begin = begin + (begin < 0) * np.array(x.shape, begin.dtype)
    end = np.where(size == -1, np.array(x.shape), begin + size)
    return x[_places(x.shape, begin, end, None, None, None, None)]


@_operation(moves=True)
def slice_update(x, update, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    places = _places(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if update.shape != x[places].shape or update.dtype != x.dtype:
        raise OperationFault(
            f"the update is {update.dtype}{list(update.shape)}, the slice {x.dtype}{list(x[places].shape)}"
        )
    result = x.copy()
    result[places] = update
    return result


@_operation(tuples=["values"], moves=True)
def concat(values, axis, interleave=False):
    if len({value.dtype for value in values}) > 1 or len({value.ndim for value in values}) > 1:
        raise OperationFault(f"its values are {', '.join(f'{value.dtype}{list(value.shape)}' for value in values)}")
    if values[0].ndim == 0:
        return np.stack(values)
    axis = _axis(axis, values[0].ndim)
    if not interleave:
        return np.concatenate(values, axis)
    # np.stack refuses different shapes, as interleaving must
    return np.stack(values, axis + 1).reshape(_scaled(values[0].shape, axis, len(values)))


def _scaled(shape: tuple[int, ...], axis: int, factor: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * factor, *shape[axis + 1 :])


@_operation(tuples=["values"], moves=True)
def stack(values, axis):
    if len({value.dtype for value in values}) > 1:
        raise OperationFault(f"its values are {', '.join(str(value.dtype) for value in values)}")
    return np.stack(values, _axis(axis, values[0].ndim + 1))


@_operation(moves=True)
def split(x, axis, num_splits=None, split_sizes=None):
    axis = _axis(axis, x.ndim)
    size = x.shape[axis]
    if split_sizes is None:
        if num_splits is None or size % int(num_splits):
            raise OperationFault(f"{size} entries are not divided evenly into {num_splits}")
        sizes = [size // int(num_splits)] * int(num_splits)
    else:
        sizes = split_sizes.tolist()
        if sum(sizes) != size or min(sizes) < 0 or num_splits not in (None, len(sizes)):
            raise OperationFault(f"{size} entries are divided into {sizes}, num_splits {num_splits}")
    ends = np.cumsum(sizes).tolist()
    before = (slice(None),) * axis
    return [x[(*before, slice(end - part, end))] for part, end in zip(sizes, ends, strict=True)]


@_operation(moves=True)
def reshape(x, shape):
    wanted = shape.tolist()
    # A zero is the dimension that stands there in x, counted from the right
    wanted = [
        size if size else x.shape[place - len(wanted)] if len(wanted) - place <= x.ndim else 1
        for place, size in enumerate(wanted)
    ]
    if min(wanted, default=0) < -1:
        raise OperationFault(f"a shape of {shape.tolist()}")
    return x.reshape(wanted)


@_operation(moves=True)
def expand_dims(x, axes):
    rank = x.ndim + len(axes)
    places = _axes(axes, rank)
    if len(set(places)) < len(places):
        raise OperationFault(f"its axes are {axes.tolist()}")
    sizes = iter(x.shape)
    return x.reshape([1 if place in places else next(sizes) for place in range(rank)])


@_operation(moves=True)
def squeeze(x, axes=None):
    places = _axes(axes, x.ndim)
    return x.reshape([size for place, size in enumerate(x.shape) if size != 1 or place not in places])


@_operation(moves=True)
def transpose(x, perm):
    return x.transpose([_axis(axis, x.ndim) for axis in perm])


@_operation(moves=True)
def tile(x, reps):
    if len(reps) != x.ndim or min(reps) < 1:
        raise OperationFault(f"it repeats {x.shape} {reps.tolist()} times")
    return np.tile(x, reps)


@_operation(moves=True)
def reverse(x, axes=None):
    return np.ascontiguousarray(np.flip(x, _axes(axes, x.ndim)))


@_operation(moves=True)
def pad(x, pad, mode="constant", constant_val=0.0):
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes or len(pad) % 2 or len(pad) > 2 * x.ndim or (pad < 0).any():
        raise OperationFault(f"it pads {x.shape} by {pad.tolist()} in mode {mode}")
    around = [(0, 0)] * (x.ndim - len(pad) // 2) + pad.reshape(-1, 2).tolist()
    if mode == "reflect" and any(max(sides) >= size for sides, size in zip(around, x.shape, strict=True) if any(sides)):
        raise OperationFault(f"it reflects {pad.tolist()} entries of {x.shape}")
    filled = {"constant_values": constant_val} if mode == "constant" else {}
    return np.pad(x, around, modes[mode], **filled)


@_operation("shape")
def shape_of(x):
    return np.array(x.shape, np.int32)


@_operation()
def range_1d(start, end, step):
    if not start.dtype == end.dtype == step.dtype or step == 0:
        raise OperationFault(f"from {start} to {end} in steps of {step}")
    return np.arange(start, end, step, dtype=start.dtype)


@_operation()
def fill(shape, value=_ZERO):
    return np.full(shape, value)


@_operation()
def fill_like(ref_tensor, value=_ZERO):
    return np.full(ref_tensor.shape, value)


@_operation()
def band_part(x, lower=-1, upper=-1):
    below = np.subtract.outer(np.arange(x.shape[-2]), np.arange(x.shape[-1]))
    band = (below <= lower if lower >= 0 else True) & (-below <= upper if upper >= 0 else True)
    return np.where(band, x, np.zeros((), x.dtype))


@_operation()
def one_hot(indices, one_hot_vector_size, axis=-1, on_value=_ON, off_value=_OFF):
    size = int(one_hot_vector_size)
    _within(indices, size)
    axis = _axis(axis, indices.ndim + 1)
    along = np.arange(size).reshape([size if place == axis else 1 for place in range(indices.ndim + 1)])
    return np.where(along == np.expand_dims(indices, axis), on_value, off_value)


# Constants that are stored smaller than they are


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` repeated in blocks, to `shape`."""
    for axis, (size, wanted) in enumerate(zip(x.shape, shape, strict=True)):
        if wanted % size:
            raise OperationFault(f"blocks of {x.shape} do not divide {shape}")
        x = np.repeat(x, wanted // size, axis)
    return x


@_operation(constant=True)
def constexpr_blockwise_shift_scale(data, scale, offset=None):
    shifted = data.astype(np.float32)
    if offset is not None:
        if offset.shape != scale.shape:
            raise OperationFault(f"its offset is of shape {offset.shape}, its scale of {scale.shape}")
        shifted = shifted - _spread(offset.astype(np.float32), data.shape)
    return shifted * _spread(scale, data.shape)


@_operation(constant=True)
def constexpr_affine_dequantize(quantized_data, zero_point, scale, axis):
    place = _axis(axis, quantized_data.ndim)

    def along(x):
        if x.shape not in ((), (1,), (quantized_data.shape[place],)):
            raise OperationFault(f"{x.shape} values along axis {place} of {quantized_data.shape}")
        return x.astype(np.float32).reshape([-1 if i == place else 1 for i in range(quantized_data.ndim)])

    return (quantized_data.astype(np.float32) - along(zero_point)) * along(scale)


@_operation(constant=True)
def constexpr_lut_to_dense(indices, lut, vector_axis=None):
    *groups, palette, vector = lut.shape
    if len(groups) != indices.ndim or (vector > 1 and vector_axis is None):
        raise OperationFault(f"a table of {lut.shape} for indices of {indices.shape}, vector_axis {vector_axis}")
    _within(indices, palette)
    which = _spread(np.arange(math.prod(groups)).reshape(groups), indices.shape)
    dense = lut.reshape(-1, palette, vector)[which, indices.astype(np.int64)]  # [*indices.shape, vector]
    if vector == 1:
        return dense[..., 0]
    axis = _axis(vector_axis, indices.ndim)
    return np.moveaxis(dense, -1, axis + 1).reshape(_scaled(indices.shape, axis, vector))


@_operation(constant=True)
def constexpr_cast(source_val, output_dtype):
    if output_dtype != "fp32":
        raise OperationFault(f"it casts to {output_dtype}, which is not known here")
    return source_val
