"""A Core ML package (`.mlpackage`) read without Core ML: its program, its constants, its interface.

A package is a folder: Manifest.json names the model file, a protobuf that holds the program in Apple's intermediate
language (MIL), and weights/weight.bin beside it holds the large constants. The protobuf is read with coremltools' own
message classes; weight.bin by `Weights`, whose format coremltools' source gives away (mlmodel/src/MILBlob): a header
of 64 bytes, then for each constant a record of 64 bytes that begins with 0xDEADBEEF and says where its bytes lie.

What cannot be read in full is a `PackageError`, never a guess.
"""

import dataclasses
import json
import logging
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MANIFEST = "Manifest.json"
MODEL_PATH = "@model_path/"  # what the names of weight files in a program begin with: the model file's folder

_HEADER = struct.Struct("<II56x")  # count of records, version
_RECORD = struct.Struct("<IIQQQ32x")  # sentinel, type, bytes, where they begin, bits of padding
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_RECORD_TYPES = {  # as MILBlob numbers them
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
_PROGRAM_TYPES = {  # as MIL.proto numbers them
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 21: "int8", 22: "int16", 23: "int32", 24: "int64",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
_SUB_BYTE = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
_NUMPY = {
    "bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64, "int8": np.int8, "int16": np.int16,
    "int32": np.int32, "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64, "int4": np.int8, "uint1": np.uint8, "uint2": np.uint8, "uint3": np.uint8, "uint4": np.uint8,
    "uint6": np.uint8,
}  # fmt: skip
_IN_BYTES = {"fp16", "int8", "uint8", "uint32", *_SUB_BYTE}  # immediate values that the protobuf keeps as raw bytes


class PackageError(ValueError):
    """A package that is not whole, or says two things at once; the message names the file and what is wrong."""


class UnknownOperation(ValueError):
    """An operation of a program, or an input of one, that is not known here; the message names it."""


class OperationFault(ValueError):
    """What an operation was given has no defined result; the message says what it was."""


class Type(NamedTuple):
    """What a value is declared to be: `dtype` ("fp16", "int32", "bool", "string", ...) and shape. None is a dimension
    that only a call decides; the file does not say which of them are one."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


class Constant(NamedTuple):
    """A value that the package holds, as it is stored: integers of less than a byte as int8 or uint8. A string is a
    `str`."""

    type: Type
    value: Any  # np.ndarray of type.shape, or str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One step of a program.

    Attributes:
        kind: its type in MIL, such as "matmul".
        inputs: of each input's name, what it is bound to: names of values, or constants that stand in the operation
            itself. More than one where the input is a tuple, as in "concat".
        outputs: name and declared type of each value that it makes.
        blocks: how many blocks are nested in it, as in loops.
    """

    kind: str
    name: str
    inputs: dict[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, Type], ...]
    blocks: int


@dataclasses.dataclass(frozen=True)
class Range:
    """What shapes an input may have: one of `listed`, or where there are none, each dimension within its `bounds`
    (lowest, highest; None: no limit)."""

    bounds: tuple[tuple[int, int | None], ...]
    listed: tuple[tuple[int, ...], ...] = ()

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether an input may have this shape."""
        if self.listed:
            return shape in self.listed
        return len(shape) == len(self.bounds) and all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, self.bounds, strict=True)
        )

    def __str__(self) -> str:
        if self.listed:
            return " or ".join(str(list(shape)) for shape in self.listed)
        sizes = (str(low) if low == high else f"{low}..{'' if high is None else high}" for low, high in self.bounds)
        return f"[{', '.join(sizes)}]"


@dataclasses.dataclass(frozen=True)
class Program:
    """A package's main function.

    Attributes:
        opset: the set of operations that it is written in: "CoreML7" is iOS 17's, "CoreML8" iOS 18's.
        inputs, states: declared types by name, in order.
        ranges: of each input, what shapes callers may give.
        outputs: names, in order.
        constants: by the name of the value.
        operations: in the order in which they run; those that only name a constant are not among them.
        metadata: what the writer wrote beside the program, such as "co.huggingface.exporters.name".
    """

    path: Path
    opset: str
    inputs: dict[str, Type]
    states: dict[str, Type]
    ranges: dict[str, Range]
    outputs: tuple[str, ...]
    constants: dict[str, Constant]
    operations: tuple[Operation, ...]
    metadata: dict[str, str]

    def types(self) -> dict[str, Type]:
        """The declared type of every value that has a name."""
        made = {name: type for operation in self.operations for name, type in operation.outputs}
        return {
            **self.inputs, **self.states, **{name: constant.type for name, constant in self.constants.items()}, **made,
        }  # fmt: skip


def read(path: str | Path) -> Program:
    """The main function of the package at `path`, checked: every name is defined before it is used.

    Raises:
        PackageError: something is missing, is damaged, or contradicts itself.
    """
    path = Path(path)
    file = _model_file(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PackageError(f"{file} cannot be read: {error.strerror}") from error
    specification = _specification(content, file)
    if specification.WhichOneof("Type") != "mlProgram":
        raise PackageError(f"{file} holds a {specification.WhichOneof('Type')}: an ML Program is needed")
    functions = specification.mlProgram.functions
    if "main" not in functions:
        raise PackageError(f"{file} has no function main: it has {', '.join(sorted(functions)) or 'none'}")
    try:
        return _Reader(path, file).program(functions["main"], specification.description)
    except (IndexError, KeyError, OverflowError) as error:
        raise PackageError(f"{file} is damaged: it contradicts itself ({type(error).__name__}: {error})") from error


def _model_file(path: Path) -> Path:
    """The model's file, as the manifest of the package at `path` names it."""
    manifest = path / MANIFEST
    if not path.is_dir():
        raise PackageError(f"{path} is no package: name a folder that holds a {MANIFEST}")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        place = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        file = path / "Data" / place
    except FileNotFoundError as error:
        raise PackageError(f"{path} is no package: it holds no {MANIFEST}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PackageError(f"{manifest} names no model ({type(error).__name__}: {error})") from error
    if not file.resolve().is_relative_to(path.resolve()):
        raise PackageError(f"{manifest} names a model outside the package: {place}")
    return file


def _specification(content: bytes, file: Path) -> Any:
    # On Linux it warns of every part of Core ML that is not there, and of a torch that it does not know
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise PackageError(f"{file} is read with coremltools, which is not installed ({error})") from error
    try:
        return Model_pb2.Model.FromString(content)
    except DecodeError as error:
        raise PackageError(f"{file} is no Core ML model: its protobuf cannot be read ({error})") from error


class Weights:
    """A weight.bin. Arrays that `read` gives are views of the file where it can be so.

    Raises:
        PackageError: there is none, or its header is none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise PackageError(f"{path} cannot be read: {error}") from error
        if len(self.bytes) < _HEADER.size:
            raise PackageError(f"{path} is cut off: it has {len(self.bytes)} bytes, its header alone {_HEADER.size}")
        self.records, version = _HEADER.unpack_from(self.bytes)
        if version != _VERSION:
            raise PackageError(f"{path} is of version {version}: version {_VERSION} can be read")

    def read(self, offset: int, type: Type) -> np.ndarray:
        """The constant whose record lies at `offset`, which is to be of `type`.

        Raises:
            PackageError: no record is there, it is of another type or size, or leaves the file.
        """
        where = f"{self.path} at byte {offset}"
        if offset % _RECORD.size or not _HEADER.size <= offset <= len(self.bytes) - _RECORD.size:
            raise PackageError(f"{where}: no record can be there, the file has {len(self.bytes)} bytes")
        sentinel, code, size, begin, padding = _RECORD.unpack_from(self.bytes, offset)
        if sentinel != _SENTINEL:
            raise PackageError(f"{where}: a record begins with {_SENTINEL:#x}, here stands {sentinel:#x}")
        if (stored := _RECORD_TYPES.get(code, f"type {code}")) != type.dtype:
            raise PackageError(f"{where}: {stored} is stored where the program declares {type}")
        if begin + size > len(self.bytes) or begin < offset + _RECORD.size:
            raise PackageError(f"{where}: {size} bytes from {begin} on do not fit the file's {len(self.bytes)}")
        return _elements(self.bytes[begin : begin + size], type, where, padding)


def _elements(raw: np.ndarray, type: Type, where: str, padding: int | None = None) -> np.ndarray:
    """The elements of `type` in the bytes `raw`; less than a byte each, they are packed from the lowest bit on."""
    count = math.prod(type.shape)
    width = _SUB_BYTE.get(type.dtype)
    bits = count * (width or 8 * np.dtype(_NUMPY[type.dtype]).itemsize)
    if len(raw) != -(-bits // 8) or padding not in (None, 8 * len(raw) - bits):
        raise PackageError(f"{where}: {len(raw)} bytes are stored, {type} takes {-(-bits // 8)}")
    if width is None:
        return raw.view(_NUMPY[type.dtype]).reshape(type.shape)
    spread = np.unpackbits(raw, bitorder="little")[:bits].reshape(count, width)
    values = np.packbits(spread, axis=1, bitorder="little")[:, 0]
    if type.dtype == "int4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)  # two's complement of four bits
    return values.reshape(type.shape)


class _Reader:
    """Reads one function, and knows where it stands, for its errors."""

    def __init__(self, path: Path, file: Path):
        self.path, self.file = path, file
        self.weights: dict[Path, Weights] = {}

    def program(self, function: Any, description: Any) -> Program:
        """The function, with the interface that `description` gives it."""
        if function.opset not in function.block_specializations:
            raise PackageError(f"{self.file} has no block for its opset {function.opset!r}")
        block = function.block_specializations[function.opset]
        inputs, states = {}, {}
        for given in function.inputs:
            if given.type.HasField("stateType"):
                states[given.name] = self.type(given.type.stateType.wrappedType, given.name)
            else:
                inputs[given.name] = self.type(given.type, given.name)
        known, constants, operations = {*inputs, *states}, {}, []
        for message in block.operations:
            operation = self.operation(message, known)
            if operation.kind == "const":
                constants[operation.outputs[0][0]] = operation.inputs["val"][0]
            else:
                operations.append(operation)
        if absent := set(block.outputs) - known:
            raise PackageError(f"{self.file}: nothing makes the output {', '.join(sorted(absent))}")
        self.compare("inputs", inputs, description.input)
        self.compare("outputs", block.outputs, description.output)
        self.compare("states", states, description.state)
        ranges = {given.name: self.range(given.type.multiArrayType, given.name) for given in description.input}
        return Program(
            self.path, function.opset, inputs, states, ranges, tuple(block.outputs), constants, tuple(operations),
            dict(description.metadata.userDefined),
        )  # fmt: skip

    def compare(self, what: str, names: Iterable[str], described: Iterable[Any]) -> None:
        """The interface is written down twice."""
        if sorted(names) != sorted(feature.name for feature in described):
            raise PackageError(
                f"{self.file}: the program's {what} are {', '.join(names) or 'none'}, the description's "
                f"{', '.join(feature.name for feature in described) or 'none'}"
            )

    def range(self, array: Any, name: str) -> Range:
        """What shapes the input `name` may have."""
        flexible = array.WhichOneof("ShapeFlexibility")
        if flexible == "enumeratedShapes":
            return Range((), tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes))
        if flexible == "shapeRange":
            sizes = array.shapeRange.sizeRanges
            return Range(tuple((size.lowerBound, None if size.upperBound < 0 else size.upperBound) for size in sizes))
        return Range(tuple((size, size) for size in array.shape))

    def operation(self, message: Any, known: set[str]) -> Operation:
        """The operation in `message`, whose outputs join the names that are `known`."""
        values = {key: value for key, value in message.attributes.items() if key != "name"}
        name = message.attributes["name"].immediateValue.tensor.strings.values[0] if (
            "name" in message.attributes
        ) else ", ".join(output.name for output in message.outputs)  # fmt: skip
        where = f"{message.type} {name}"
        inputs = {key: (self.constant(value, where),) for key, value in values.items()}
        for key, argument in message.inputs.items():
            inputs[key] = tuple(
                binding.name if binding.WhichOneof("binding") == "name" else self.constant(binding.value, where)
                for binding in argument.arguments
            )
            names = [bound for bound in inputs[key] if isinstance(bound, str)]
            if absent := [bound for bound in names if bound not in known]:
                raise PackageError(f"{self.file}: {where} uses {absent[0]}, which nothing before it makes")
        outputs = tuple((output.name, self.type(output.type, output.name)) for output in message.outputs)
        for output, _ in outputs:
            if output in known:
                raise PackageError(f"{self.file}: two operations make {output}")
            known.add(output)
        if message.type == "const" and (set(inputs) != {"val"} or inputs["val"][0].type != outputs[0][1]):
            raise PackageError(f"{self.file}: {where} declares {outputs[0][1]} and holds something else")
        return Operation(message.type, name, inputs, outputs, len(message.blocks))

    def type(self, message: Any, name: str) -> Type:
        """A tensor's declared type."""
        tensor = message.tensorType
        if not message.HasField("tensorType") or tensor.dataType not in _PROGRAM_TYPES:
            raise PackageError(f"{self.file}: {name} is no tensor of a known type: {message.WhichOneof('type')}")
        shape = tuple(
            size.constant.size if size.WhichOneof("dimension") == "constant" else None for size in tensor.dimensions
        )
        if tensor.rank != len(shape) or any(size.unknown.variadic for size in tensor.dimensions):
            raise PackageError(f"{self.file}: {name} is declared with rank {tensor.rank} and {len(shape)} dimensions")
        if tensor.attributes:
            raise PackageError(f"{self.file}: {name} has attributes that are not known: {', '.join(tensor.attributes)}")
        return Type(_PROGRAM_TYPES[tensor.dataType], shape)

    def constant(self, message: Any, where: str) -> Constant:
        """A value, from the message itself or from weight.bin."""
        type = self.type(message.type, where)
        if message.WhichOneof("value") == "blobFileValue":
            return Constant(type, self.stored(message.blobFileValue, type))
        tensor = message.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            raise PackageError(f"{self.file}: {where} holds no value")
        values = getattr(tensor, field).values
        if type.dtype == "string":
            if field != "strings" or len(values) != 1:
                raise PackageError(f"{self.file}: {where} declares one string and holds {len(values)} {field}")
            return Constant(type, values[0])
        if (field == "bytes") != (type.dtype in _IN_BYTES) or field == "strings":
            raise PackageError(f"{self.file}: {where} declares {type} and holds {field}")
        if field == "bytes":
            raw = np.frombuffer(values, np.uint8)
            return Constant(type, _elements(raw, type, f"{self.file}: {where}"))
        if len(values) != math.prod(type.shape):
            raise PackageError(f"{self.file}: {where} declares {type} and holds {len(values)} values")
        return Constant(type, np.array(values, dtype=_NUMPY[type.dtype]).reshape(type.shape))

    def stored(self, place: Any, type: Type) -> np.ndarray:
        """The constant that a weight file holds."""
        if not place.fileName.startswith(MODEL_PATH):
            raise PackageError(f"{self.file} names a weight file outside the package: {place.fileName}")
        path = self.file.parent / place.fileName.removeprefix(MODEL_PATH)
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise PackageError(f"{self.file} names a weight file outside the package: {place.fileName}")
        if path not in self.weights:
            self.weights[path] = Weights(path)
        return self.weights[path].read(place.offset, type)
