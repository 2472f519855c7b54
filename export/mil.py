"""Runs a Core ML package without Core ML: python -m export.mil FOLDER --prompt "Once upon a time"

`Package` interprets the program operation by operation (export/operations.py) and keeps what it notices in `Findings`:
operations that are not known, values that are not what the program declares, numbers that are not finite, the largest
activations. In three precisions, which together tell an error of the graph from rounding:

- "fp32": constants as they are stored, everything else in fp32, states too. Compared with torch that holds the
  package's own weights, it shows errors of the graph and nothing else.
- "fp16": each result is rounded to the type that the program declares for it, sums are taken in fp32.
- "fp16-accumulate": where the program declares fp16, sums are taken in fp16 as well, one term after the other.

Devices differ; what they do lies between or near the last two. The command writes greedy text from a folder that holds
model.mlpackage and a tokenizer. Exit codes: 0 done, 1 the folder cannot be used or its package is not right, 2 wrong
arguments.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from export.program import Operation, OperationFault, PackageError, Program, Type, UnknownOperation, read
from machine import process

if TYPE_CHECKING:
    from export.operations import Definition
    from tokenizer import Tokenizer

PRECISIONS = ("fp32", "fp16", "fp16-accumulate")
OPSETS = ("CoreML7", "CoreML8", "CoreML9")  # iOS 17, 18, 26: gather and reshape meant something else before
HALF_MAX = 65_504.0  # the largest number of fp16
MODEL = "model.mlpackage"

_READ, _WRITE, _UPDATE = "read_state", "write_state", "coreml_update_state"
_STATE_INPUTS = {_READ: {"input"}, _WRITE: {"input", "data"}, _UPDATE: {"state", "value"}}
_FLOATS = ("fp16", "fp32")


@dataclasses.dataclass
class Findings:
    """What was noticed in a package while it ran.

    Attributes:
        missing: operations that are not known, and known ones with inputs that are not.
        shapes: of values that are not of the declared type or shape: what was declared, and what came, or what it is
            made of, where the types of an operation's floating-point inputs and outputs differ.
        not_finite: of operations that made infinities or what is no number: their kind.
        largest: of operations that make numbers: their kind and the largest absolute value.
        too_large: of values that are declared as fp16, which does not hold them: the largest absolute value. Only
            "fp32" sees them; in the other precisions they are infinite.
        predictions: how many calls this is the sum of.
    """

    missing: list[str] = dataclasses.field(default_factory=list)
    shapes: dict[str, str] = dataclasses.field(default_factory=dict)
    not_finite: dict[str, str] = dataclasses.field(default_factory=dict)
    largest: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    too_large: dict[str, float] = dataclasses.field(default_factory=dict)
    predictions: int = 0

    def problems(self) -> list[str]:
        """All that is wrong, a line each; none where the package is right as far as it ran."""
        return [
            *(f"unknown operation: {text}" for text in self.missing),
            *(f"{name}: {text}" for name, text in self.shapes.items()),
            *(f"{name}: {kind} made numbers that are not finite" for name, kind in self.not_finite.items()),
            *(f"{name}: {value:.4g} is more than fp16 holds" for name, value in self.too_large.items()),
        ]

    def largest_by_kind(self) -> dict[str, float]:
        """The largest absolute value that each kind of operation made, largest first."""
        kinds: dict[str, float] = {}
        for kind, value in self.largest.values():
            kinds[kind] = max(kinds.get(kind, 0.0), value)
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))


class _Output(NamedTuple):
    """What one value of a program has to be, and where it goes."""

    slot: int
    name: str
    kind: str
    type: Type
    dtype: np.dtype  # as it is held here
    rounds: bool  # to fp16
    measured: bool


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation, ready to be run."""

    where: str
    compute: Callable[..., Any] | None  # takes what is not constant; None where a state is read or written
    single: tuple[tuple[str, int], ...]  # inputs, and the slots where their values lie
    several: tuple[tuple[str, tuple[int, ...]], ...]  # inputs that are tuples
    outputs: tuple[_Output, ...]
    freed: tuple[int, ...]  # slots that nothing after it reads
    read: str | None = None  # a state
    written: tuple[str, int] | None = None  # a state, and the slot of its new value


class Package:
    """A `.mlpackage`, ready to predict. Constants are decoded once.

    Args:
        path: of the package.
        precision: one of `PRECISIONS`.
        round_states: whether states are kept in the type that they are declared in, also in "fp32".

    Attributes:
        program: what was read.
        findings: what all predictions so far have shown.

    Raises:
        PackageError: it cannot be read, or is written in a set of operations that is not known.
        OperationFault: a constant cannot be decoded.
    """

    def __init__(self, path: str | Path, precision: str = "fp32", round_states: bool | None = None):
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}: use one of {', '.join(PRECISIONS)}")
        from export import operations  # brings torch, which `--help` does not need

        self._definitions, self._half = operations.OPERATIONS, operations.rounded
        self.program: Program = read(path)
        self._types = self.program.types()
        if self.program.opset not in OPSETS:
            raise PackageError(f"{path} is written in {self.program.opset}: {', '.join(OPSETS)} can be read")
        self.precision = precision
        self.findings = Findings()
        self._rounds = precision != "fp32"
        self._rounds_states = self._rounds if round_states is None else round_states
        self._slots: dict[str, int] = {}
        self._values: list[Any] = []  # constants where they are known, None elsewhere
        for name, constant in self.program.constants.items():
            self._slot(name, held(constant.value))
        for name in self.program.inputs:
            self._slot(name)
        self._steps = [step for step in map(self._step, self.program.operations) if step]
        self._free()

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant, decoded as it is stored; None if there is none of this name."""
        slot = self._slots.get(name)
        return None if slot is None else self._values[slot]

    def constants_of(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """All constants of floating-point numbers of that shape."""
        for value in self._values:
            if isinstance(value, np.ndarray) and value.shape == shape and value.dtype.kind == "f":
                yield value

    def new_state(self) -> dict[str, np.ndarray]:
        """The states of a new text: zeros. Each call of `predict` replaces their values."""
        return {name: np.zeros(type.shape, _held_dtype(type)) for name, type in self.program.states.items()}

    def predict(self, inputs: dict[str, Any], state: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The outputs by name, floating-point numbers as float32.

        Args:
            inputs: an array of each input, of a shape that the package allows.
            state: from `new_state`; the program reads and changes it. Needed where there are states.

        Raises:
            UnknownOperation: the program holds operations or inputs of theirs that are not known.
            ValueError: inputs or a state that the program does not take.
            OperationFault: what an operation was given has no defined result.
        """
        if self.findings.missing:
            raise UnknownOperation(f"{self.program.path}: {'; '.join(self.findings.missing)}")
        self._check_state(state)
        values = self._values.copy()
        for name, value in self._checked(inputs).items():
            values[self._slots[name]] = value
        self.findings.predictions += 1
        with np.errstate(all="ignore"):  # infinities are found where they come out
            for step in self._steps:
                self._run(step, values, state)
        return {name: values[self._slots[name]] for name in self.program.outputs}

    def _run(self, step: _Step, values: list[Any], state: dict[str, np.ndarray] | None) -> None:
        if step.written:
            name, slot = step.written
            self._write(name, values[slot], state, step.where)
        if step.read:
            results = (state[step.read],)
        elif step.compute is None:
            results = ()
        else:
            given = {name: values[slot] for name, slot in step.single}
            for name, slots in step.several:
                given[name] = [values[slot] for slot in slots]
            try:
                results = step.compute(**given)
            except (OperationFault, ValueError, IndexError, TypeError, RuntimeError) as error:
                raise OperationFault(f"{step.where}: {error}") from error
            if type(results) is not list:
                results = (results,)
            if len(results) != len(step.outputs):
                raise OperationFault(f"{step.where} makes {len(results)} values, {len(step.outputs)} are declared")
        for output, value in zip(step.outputs, results, strict=True):
            values[output.slot] = self._noted(output, value)
        for slot in step.freed:
            values[slot] = None

    def _noted(self, output: _Output, value: Any) -> np.ndarray:
        """`value`, rounded as the program declares it, after a look at it."""
        if type(value) is not np.ndarray:
            value = np.asarray(value)
        if output.rounds:
            value = self._half(value)
        declared = output.type.shape
        if value.dtype != output.dtype or (value.shape != declared and not _fits(value.shape, declared)):
            came = f"{value.dtype}{list(value.shape)}"
            self.findings.shapes.setdefault(output.name, f"declared as {output.type}, {came} came of {output.kind}")
        if output.measured and value.size and value.dtype == np.float32:
            highest, lowest = float(np.maximum.reduce(value, axis=None)), float(np.minimum.reduce(value, axis=None))
            size = max(highest, -lowest)
            if not size < float("inf"):  # so that what is no number is none either
                self.findings.not_finite[output.name] = output.kind
            elif size > self.findings.largest.get(output.name, (output.kind, -1.0))[1]:
                self.findings.largest[output.name] = (output.kind, size)
                if size > HALF_MAX and output.type.dtype == "fp16":
                    self.findings.too_large[output.name] = size
        return value

    def _write(self, name: str, value: np.ndarray, state: dict[str, np.ndarray], where: str) -> None:
        type = self.program.states[name]
        if value.shape != type.shape:
            raise OperationFault(f"{where}: the state {name} is {type}, it is given {list(value.shape)}")
        state[name] = self._half(value) if self._rounds_state(type) else value

    def _rounds_state(self, type: Type) -> bool:
        return self._rounds_states and type.dtype == "fp16"

    def _check_state(self, state: dict[str, np.ndarray] | None) -> None:
        states = self.program.states
        if (state or {}).keys() != states.keys():
            raise ValueError(f"the states are {', '.join(states) or 'none'}: give what new_state() gives")
        for name, type in states.items():
            if state[name].shape != type.shape or state[name].dtype != _held_dtype(type):
                raise ValueError(f"the state {name} is {type}: {state[name].dtype}{list(state[name].shape)} was given")

    def _checked(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """The inputs as the program takes them."""
        if inputs.keys() != self.program.inputs.keys():
            raise ValueError(f"the inputs are {', '.join(self.program.inputs)}: {', '.join(inputs)} was given")
        checked = {}
        for name, type in self.program.inputs.items():
            given = np.asarray(inputs[name])
            value = given.astype(_held_dtype(type))
            if self._rounds and type.dtype == "fp16":
                value = self._half(value)
            if value.dtype.kind in "iub" and not np.array_equal(value, given):
                raise ValueError(f"{name} is {type}, which does not hold what was given")
            if not self.program.ranges[name].allows(value.shape) or not _fits(value.shape, type.shape):
                raise ValueError(f"{name} may be of shape {self.program.ranges[name]}: {list(value.shape)} was given")
            checked[name] = value
        return checked

    # Making the steps

    def _slot(self, name: str, value: Any = None) -> int:
        self._slots[name] = len(self._values)
        self._values.append(value)
        return self._slots[name]

    def _step(self, operation: Operation) -> _Step | None:
        """The operation made ready; None if it could be done at once, or is not known."""
        where = f"{operation.kind} {operation.name}"
        if operation.kind in _STATE_INPUTS and not operation.blocks:
            return self._state_step(operation, where)
        definition = self._definitions.get(operation.kind)
        try:
            if definition is None or operation.blocks:
                raise UnknownOperation(operation.kind)
            definition.check(operation.kind, operation.inputs)
        except UnknownOperation as error:
            self.findings.missing.append(f"{error} ({operation.name})")
            for name, _ in operation.outputs:
                self._slot(name)
            return None
        constants, single, several = self._bound(operation, definition, where)
        half_sums = self.precision == "fp16-accumulate" and operation.outputs[0][1].dtype == "fp16"
        if definition.sums and half_sums:
            constants["half"] = True
        if definition.constant:
            self._decode(operation, definition, constants, bool(single), where)
            return None
        self._compare_types(operation)
        outputs = self._outputs(operation, not definition.moves)
        compute = functools.partial(definition.function, **constants)
        return _Step(where, compute, single, several, outputs, freed=())

    def _bound(
        self, operation: Operation, definition: "Definition", where: str
    ) -> tuple[dict[str, Any], tuple[tuple[str, int], ...], tuple[tuple[str, tuple[int, ...]], ...]]:
        """The inputs of an operation: constants by name, and where the others lie."""
        constants, single, several = {}, [], []
        for name, bound in operation.inputs.items():
            slots = tuple(
                self._slots[value] if isinstance(value, str) else self._slot(f"{where}.{name}", held(value.value))
                for value in bound
            )
            if name in definition.tuples:
                several.append((name, slots))
            elif len(slots) != 1:
                raise PackageError(f"{self.program.path}: {where} has {len(slots)} values for its input {name}")
            elif self._values[slots[0]] is None:
                single.append((name, slots[0]))
            else:
                constants[name] = self._values[slots[0]]
        return constants, tuple(single), tuple(several)

    def _compare_types(self, operation: Operation) -> None:
        """Floating-point numbers are held in fp32 here whatever they are declared as, so that no run shows whether what
        an operation takes and makes is declared as of one type. Constants may be of another, and masks."""
        if operation.kind == "cast":
            return
        taken = {
            self._types[value].dtype
            for name, bound in operation.inputs.items() for value in bound
            if name != "attn_mask" and isinstance(value, str) and self._values[self._slots[value]] is None
        } & set(_FLOATS)  # fmt: skip
        for name, type in operation.outputs:
            if type.dtype in _FLOATS and taken - {type.dtype}:
                made = " and ".join(sorted(taken))
                self.findings.shapes[name] = f"declared as {type}, {operation.kind} makes it of {made}"

    def _outputs(self, operation: Operation, makes: bool) -> tuple[_Output, ...]:
        return tuple(
            _Output(
                self._slot(name), name, operation.kind, type, _held_dtype(type),
                rounds=self._rounds and makes and type.dtype == "fp16",
                measured=makes and type.dtype in _FLOATS,
            )
            for name, type in operation.outputs
        )  # fmt: skip

    def _decode(
        self, operation: Operation, definition: "Definition", constants: dict[str, Any], depends: bool, where: str
    ) -> None:
        """Work out a constant that is stored smaller than it is."""
        if depends:
            raise PackageError(f"{self.program.path}: {where} depends on what is not constant")
        ((name, type),) = operation.outputs
        try:
            value = np.ascontiguousarray(definition.function(**constants))
        except (ValueError, IndexError, TypeError) as error:
            raise OperationFault(f"{where}: {error}") from error
        if value.shape != type.shape:
            self.findings.shapes[name] = f"declared as {type}, {list(value.shape)} came of {operation.kind}"
        # It is a constant of this type in every precision: what torch is given to compare with
        self._slot(name, self._half(value) if type.dtype == "fp16" else value)

    def _state_step(self, operation: Operation, where: str) -> _Step | None:
        needed = _STATE_INPUTS[operation.kind]
        if set(operation.inputs) != needed:
            inputs = ", ".join(sorted(operation.inputs))
            self.findings.missing.append(f"{operation.kind} with inputs {inputs} ({operation.name})")
            return None
        state = operation.inputs["state" if operation.kind == _UPDATE else "input"][0]
        if state not in self.program.states:
            raise PackageError(f"{self.program.path}: {where} is of {state}, which is no state")
        written = None
        if operation.kind != _READ:
            source = operation.inputs["value" if operation.kind == _UPDATE else "data"][0]
            written = (state, self._slots[source])
        outputs = self._outputs(operation, makes=False)
        return _Step(where, None, (), (), outputs, (), state if outputs else None, written)

    def _free(self) -> None:
        """Have each step forget what nothing after it reads, so that a long prompt does not fill the memory."""
        needed = {self._slots[name] for name in self.program.outputs if name in self._slots}
        needed |= {slot for slot, value in enumerate(self._values) if value is not None}
        for index in reversed(range(len(self._steps))):
            step = self._steps[index]
            used = {slot for _, slot in step.single} | {slot for _, slots in step.several for slot in slots}
            used |= {output.slot for output in step.outputs} | ({step.written[1]} if step.written else set())
            self._steps[index] = dataclasses.replace(step, freed=tuple(sorted(used - needed)))
            needed |= used


def held(value: Any) -> Any:
    """A stored constant as operations take it: floating-point numbers as float32."""
    if isinstance(value, str):
        return value
    return np.array(value, np.float32 if value.dtype.kind == "f" else value.dtype)


def _held_dtype(type: Type) -> np.dtype:
    return np.dtype(np.float32 if type.dtype in _FLOATS else np.bool_ if type.dtype == "bool" else type.dtype)


def _fits(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    # A list, since this runs for each value, and generators take their time to begin
    return len(shape) == len(declared) and all(
        [size == wanted or wanted is None for size, wanted in zip(shape, declared, strict=True)]
    )


class Writer:
    """A package of a language model as something that continues a text: one input of token ids [1, T], logits
    [1, T, V].

    Raises:
        ValueError: the package has other inputs or outputs.
    """

    def __init__(self, package: Package):
        self.package = package
        program = package.program
        if len(program.inputs) != 1 or len(program.outputs) != 1:
            raise ValueError(
                f"{program.path} takes {', '.join(program.inputs)} and gives {', '.join(program.outputs)}: one input "
                "of token ids and one output of logits are needed"
            )
        ((self.input, type),) = program.inputs.items()
        if type.dtype != "int32" or len(type.shape) != 2:
            raise ValueError(f"{program.path}: {self.input} is {type}, int32[1, ?] is needed")
        (self.output,) = program.outputs
        bounds = program.ranges[self.input].bounds
        self.longest: int | None = bounds[1][1] if bounds else None
        self.state = package.new_state()
        self._seen: list[int] = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [len(ids), V] of what follows each of `ids`, which go on where the last call ended."""
        self._seen += ids
        given = ids if self.state else self._seen  # without states it reads everything each time
        outputs = self.package.predict({self.input: np.array([given], np.int32)}, self.state or None)
        return outputs[self.output][0, -len(ids) :]

    def write(self, prompt: Sequence[int], most: int, ends: Sequence[int]) -> Iterator[int]:
        """Up to `most` tokens that follow `prompt`, each the likeliest; ends before one of `ends`, or where the text
        is as long as the package allows."""
        ids = list(prompt)
        for _ in range(most):
            token = int(self.logits(ids)[-1].argmax())
            if token in ends:
                return
            yield token
            if self.longest is not None and len(self._seen) >= self.longest:
                return
            ids = [token]


def _begin(folder: Path, tokenizer: "Tokenizer") -> list[int]:
    """What stands before a text: as the folder's golden prompts have it, else what the tokenizer says."""
    try:
        return [int(token) for token in json.loads((folder / "golden.json").read_text(encoding="utf-8"))["begin"]]
    except (OSError, ValueError, KeyError, TypeError):
        return [tokenizer.begin_of_text]


def main() -> int:
    """Load the folder, write, say what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m export.mil",
        description="Write greedy text from a Core ML package, on any computer: it is interpreted, not run by Core ML.",
    )
    parser.add_argument("folder", type=Path, help=f"holds {MODEL} and a tokenizer")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="at most so many (default: 60)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="to compute in (default: fp16)")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {arguments.max_new_tokens}: use 1 or more")
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows fewer characters than the model
    process.prepare()
    from checkpoints import CheckpointError
    from checkpoints.huggingface import end_ids
    from tokenizer import Tokenizer, TokenizerError

    try:
        tokenizer = Tokenizer.load(arguments.folder)
        ends = {tokenizer.end_of_text, *end_ids(arguments.folder)}
        package = Package(arguments.folder / MODEL, arguments.precision)
        writer = Writer(package)
        prompt = [*_begin(arguments.folder, tokenizer), *tokenizer.encode(arguments.prompt)]
        if writer.longest is not None and len(prompt) > writer.longest:
            print(f"the prompt has {len(prompt)} tokens: use at most the package's {writer.longest}", file=sys.stderr)
            return 2
        new = list(writer.write(prompt, arguments.max_new_tokens, sorted(ends)))
    except (TokenizerError, CheckpointError, PackageError, UnknownOperation, OperationFault, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.prompt}{tokenizer.continuation(prompt, new)}")
    problems = package.findings.problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
