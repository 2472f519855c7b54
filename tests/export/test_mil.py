"""The interpreter of Core ML packages: it computes what torch computes, notices what is wrong with a package, and
refuses one that is damaged.

The packages are those of a small model that coremltools converts here; faults are planted into their protobuf and
weight.bin.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from export import mil, parity, program
from export.program import OperationFault, PackageError, UnknownOperation
from tests.conftest import ROOT
from tests.export import small_gpt
from tests.export.small_gpt import CONTEXT, DATA, VOCAB
from tokenizer import Tokenizer

pytest.importorskip("coremltools")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.jit and of coremltools' own casts

IDS = np.random.default_rng(1).integers(0, 200, CONTEXT).tolist()
CHUNKS = (5, 1, 1, 9, 1, 3)


@pytest.fixture(scope="module")
def stateful(tmp_path_factory) -> Path:
    return small_gpt.convert(small_gpt.build(True, F.silu), tmp_path_factory.mktemp("stateful") / mil.MODEL)


@pytest.fixture(scope="module")
def stateless(tmp_path_factory) -> Path:
    return small_gpt.convert(small_gpt.build(False, F.gelu), tmp_path_factory.mktemp("stateless") / mil.MODEL)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Logits [T, V] that torch gives to IDS, in the chunks."""
    model = small_gpt.build(True, F.silu)
    return np.concatenate([model(part)[0].numpy() for part in torch.tensor([IDS[:sum(CHUNKS)]]).split(CHUNKS, 1)])


def logits(package: mil.Package, state: dict[str, np.ndarray]) -> np.ndarray:
    """Of IDS, in the chunks."""
    parts, begin = [], 0
    for size in CHUNKS:
        parts.append(package.predict({"inputIds": [IDS[begin : begin + size]]}, state)["logits"][0])
        begin += size
    return np.concatenate(parts)


def test_a_package_with_states_computes_what_torch_computes(stateful, expected):
    package = mil.Package(stateful)
    made = logits(package, package.new_state())
    assert parity.compare(expected, made).problems(parity.GRAPH) == []
    assert package.findings.problems() == []
    assert package.findings.predictions == len(CHUNKS)
    assert package.findings.largest["logits"] == ("linear", pytest.approx(np.abs(made).max()))
    assert package.findings.largest_by_kind()["silu"] > 0
    assert np.array_equal(logits(package, package.new_state()), made)  # a second text, in a fresh state


def test_a_state_that_is_not_reset_shows(stateful, expected):
    package = mil.Package(stateful)
    state = package.new_state()
    package.predict({"inputIds": [[7]]}, state)
    assert parity.compare(expected, logits(package, state)).problems(parity.GRAPH)


def test_rounding_shows_in_the_precisions_that_round(stateful, expected):
    errors = {}
    for precision in mil.PRECISIONS:
        package = mil.Package(stateful, precision)
        made = parity.compare(expected, logits(package, package.new_state()))
        errors[precision] = made.mean_kl
        assert made.problems(parity.ROUNDING) == [], precision
        assert package.findings.problems() == []
    assert errors["fp32"] < 1e-9 < errors["fp16"] < errors["fp16-accumulate"]


def test_states_are_rounded_where_that_is_asked(stateful):
    for rounds, precision in ((False, "fp32"), (True, "fp32"), (True, "fp16")):
        package = mil.Package(stateful, precision, round_states=True if rounds else None)
        state = package.new_state()
        package.predict({"inputIds": [IDS[:9]]}, state)
        exact = [np.array_equal(value, value.astype(np.float16)) for value in state.values()]
        assert exact == [rounds, rounds]


@pytest.mark.parametrize("length", [1, 9, CONTEXT])
def test_a_package_without_states_computes_what_torch_computes(stateless, length):
    ids = IDS[:length]
    wanted = small_gpt.build(False, F.gelu)(torch.tensor([ids]))[0].numpy()
    package = mil.Package(stateless)
    made = package.predict({"inputIds": np.array([ids], np.int64)})["logits"][0]
    assert parity.compare(wanted, made).problems(parity.GRAPH) == []
    assert package.findings.problems() == []


def test_what_the_package_does_not_take_is_refused(stateful, stateless):
    package, without = mil.Package(stateful), mil.Package(stateless)
    state = package.new_state()
    for inputs, message in (
        ({"input_ids": [[1]]}, "the inputs are inputIds: input_ids was given"),
        ({"inputIds": [1]}, r"inputIds may be of shape \[1, 1..24\]: \[1\] was given"),
        ({"inputIds": [[1], [1]]}, r"\[2, 1\] was given"),
        ({"inputIds": [[1] * (CONTEXT + 1)]}, r"\[1, 25\] was given"),
        ({"inputIds": [[]]}, r"\[1, 0\] was given"),
        ({"inputIds": [[1.5]]}, "inputIds is int32.*, which does not hold"),
        ({"inputIds": [[2**40]]}, "inputIds is int32.*, which does not hold"),
    ):
        with pytest.raises(ValueError, match=message):
            package.predict(inputs, state)
    with pytest.raises(ValueError, match="the states are keyCache, valueCache"):
        package.predict({"inputIds": [[1]]})
    with pytest.raises(ValueError, match="the states are none"):
        without.predict({"inputIds": [[1]]}, state)
    with pytest.raises(ValueError, match="the state keyCache is fp16"):
        package.predict({"inputIds": [[1]]}, {**state, "keyCache": np.zeros((1, 2))})
    with pytest.raises(OperationFault, match=f"gather .*: indices of {VOCAB} to {VOCAB} into {VOCAB} entries"):
        package.predict({"inputIds": [[VOCAB]]}, state)
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        mil.Package(stateful, "fp8")


def test_what_is_not_known_is_found_and_refused(stateful, tmp_path):
    def change(specification):
        for operation in small_gpt.operations(specification):
            if operation.type == "silu":
                operation.type = "swish"
            if operation.type == "layer_norm":
                operation.inputs["groups"].CopyFrom(operation.inputs["axes"])
            if operation.type == "write_state":
                operation.inputs["mask"].CopyFrom(operation.inputs["data"])

    package = mil.Package(small_gpt.damaged(stateful, tmp_path / "x", change))
    kinds = [text.split(" (")[0] for text in package.findings.missing]
    assert sorted(kinds) == sorted([
        "layer_norm has an input that is not known here: groups", *["swish"] * 2,
        *["write_state with inputs data, input, mask"] * 2,
    ])  # fmt: skip
    assert package.findings.problems()[0].startswith("unknown operation: ")
    with pytest.raises(UnknownOperation, match="swish .*"):
        package.predict({"inputIds": [[1]]}, package.new_state())


def test_a_state_that_is_updated_and_read_in_one_operation(stateful, tmp_path, expected):
    """coremltools writes it as two; its own dialect has it as one."""

    def change(specification):
        for operation in small_gpt.operations(specification):
            if operation.type == "write_state":
                operation.type = "coreml_update_state"
                for old, new in (("input", "state"), ("data", "value")):
                    operation.inputs[new].CopyFrom(operation.inputs[old])
                    del operation.inputs[old]
                name = operation.inputs["state"].arguments[0].name
                type = next(feature.type for feature in specification.mlProgram.functions["main"].inputs
                            if feature.name == name).stateType.wrappedType  # fmt: skip
                operation.outputs.add(name=f"{name}_read").type.CopyFrom(type)

    package = mil.Package(small_gpt.damaged(stateful, tmp_path / "x", change))
    assert parity.compare(expected, logits(package, package.new_state())).problems(parity.GRAPH) == []
    assert package.findings.problems() == []


def test_another_set_of_operations_is_refused(stateful, tmp_path):
    def change(specification):
        function = specification.mlProgram.functions["main"]
        function.block_specializations["CoreML5"].CopyFrom(function.block_specializations[function.opset])
        function.opset = "CoreML5"

    with pytest.raises(PackageError, match="is written in CoreML5: CoreML7, CoreML8, CoreML9 can be read"):
        mil.Package(small_gpt.damaged(stateful, tmp_path / "x", change))


def test_a_value_that_is_not_as_declared_is_found(stateful, tmp_path):
    """As coremltools declares a mask that is made of two scalars: [] where a matrix comes."""
    names = {}

    def change(specification):
        for operation in small_gpt.operations(specification):
            tensor = operation.outputs[0].type.tensorType if operation.outputs else None
            if operation.type == "silu" and "shape" not in names:
                names["shape"] = operation.outputs[0].name
                tensor.rank = 0
                del tensor.dimensions[:]
            elif operation.type == "layer_norm":
                names["size"] = operation.outputs[0].name
                tensor.dimensions[2].constant.size = 33
            elif operation.type == "range_1d":
                names["dtype"] = operation.outputs[0].name
                tensor.dataType = 22  # int16
            elif operation.type == "rsqrt":
                names["half"] = operation.outputs[0].name
                tensor.dataType = 11  # fp32
            elif operation.type == "mul" and operation.inputs["y"].arguments[0].name == names.get("half"):
                names["mixed"] = operation.outputs[0].name

    package = mil.Package(small_gpt.damaged(stateful, tmp_path / "x", change))
    package.predict({"inputIds": [[1, 2]]}, package.new_state())
    assert package.findings.shapes == {
        names["dtype"]: "declared as int16[?], int32[2] came of range_1d",
        names["size"]: "declared as fp16[1, ?, 33], float32[1, 2, 32] came of layer_norm",
        names["shape"]: "declared as fp16[], float32[1, 2, 48] came of silu",
        names["half"]: "declared as fp32[1, ?, 1], rsqrt makes it of fp16",
        names["mixed"]: "declared as fp16[1, ?, 32], mul makes it of fp16 and fp32",
    }
    assert len(package.findings.problems()) == 5


def weight_offset(path: Path, prefix: str) -> tuple[Path, int]:
    """The weight file of a package, and where in it the record of the first constant of this name lies."""
    found = []

    def look(specification):
        for operation in small_gpt.operations(specification):
            if operation.type == "const" and operation.outputs[0].name.startswith(prefix):
                found.append(operation.attributes["val"].blobFileValue.offset)

    copy = path.parent / "looked_at"
    small_gpt.damaged(path, copy, look)
    shutil.rmtree(copy)
    return path / DATA / "weights" / "weight.bin", found[0]


def test_one_flipped_bit_of_a_weight_shows(stateful, tmp_path, expected):
    path = tmp_path / "x"
    shutil.copytree(stateful, path)
    file, offset = weight_offset(path, "out_0_weight")
    content = bytearray(file.read_bytes())
    content[offset + 64 + 2 * 37 + 1] ^= 0x40  # the highest of its exponent
    file.write_bytes(content)
    package = mil.Package(path)
    assert parity.compare(expected, logits(package, package.new_state())).problems(parity.GRAPH)


def test_numbers_that_fp16_does_not_hold_are_found(stateful, tmp_path):
    path = tmp_path / "x"
    shutil.copytree(stateful, path)
    file, offset = weight_offset(path, "up_0_weight")
    content = bytearray(file.read_bytes())
    begin = offset + 64
    content[begin : begin + 2 * 48 * 32] = np.full(48 * 32, 60_000, np.float16).tobytes()
    file.write_bytes(content)
    found = {}
    for precision in ("fp32", "fp16"):
        package = mil.Package(path, precision)
        package.predict({"inputIds": [[1, 2]]}, package.new_state())
        found[precision] = package.findings
    assert found["fp32"].not_finite == {} != found["fp32"].too_large
    assert "linear" in found["fp16"].not_finite.values()
    assert any("is more than fp16 holds" in text for text in found["fp32"].problems())
    assert any("made numbers that are not finite" in text for text in found["fp16"].problems())


def bytes_changed(change):
    """A damage of weight.bin."""

    def damage(path: Path) -> None:
        file, offset = weight_offset(path, "out_0_weight")
        content = bytearray(file.read_bytes())
        file.write_bytes(change(content, offset))

    return damage


def put(content: bytearray, offset: int, format: str, *values: int) -> bytearray:
    struct.pack_into(format, content, offset, *values)
    return content


def model_changed(change):
    """A damage of the protobuf."""

    def damage(path: Path) -> None:
        copy = path.parent / "changed"
        small_gpt.damaged(path, copy, change)
        shutil.rmtree(path)
        copy.rename(path)

    return damage


def rename_first_use(specification):
    next(op for op in small_gpt.operations(specification) if op.type == "silu").inputs["x"].arguments[0].name = "ghost"


def repeat_an_output(specification):
    first, second = [op for op in small_gpt.operations(specification) if op.type == "silu"]
    second.outputs[0].name = first.outputs[0].name


def shorten_a_constant(specification):
    op = next(op for op in small_gpt.operations(specification) if op.type == "const" and
              op.attributes["val"].immediateValue.tensor.ints.values)  # fmt: skip
    op.attributes["val"].immediateValue.tensor.ints.values.append(1)


DAMAGES = {
    "is no package: it holds no Manifest.json": lambda path: (path / "Manifest.json").unlink(),
    "Manifest.json names no model": lambda path: (path / "Manifest.json").write_text("{}"),
    "Manifest.json names a model outside the package": lambda path: (path / "Manifest.json").write_text(
        json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../../b"}}})),
    "model.mlmodel cannot be read: No such file": lambda path: (path / DATA / "model.mlmodel").unlink(),
    "model.mlmodel is no Core ML model": lambda path: (path / DATA / "model.mlmodel").write_bytes(b"\xff" * 99),
    "weight.bin cannot be read": lambda path: shutil.rmtree(path / DATA / "weights"),
    "weight.bin is cut off: it has 63 bytes": bytes_changed(lambda content, offset: content[:63]),
    "weight.bin is of version 3": bytes_changed(lambda content, offset: put(content, 4, "<I", 3)),
    "no record can be there, the file has": bytes_changed(lambda content, offset: content[:offset]),
    "bytes from .* on do not fit the file's": bytes_changed(lambda content, offset: content[: offset + 70]),
    "a record begins with 0xdeadbeef, here stands 0x7": bytes_changed(
        lambda content, offset: put(content, offset, "<I", 7)),
    "int8 is stored where the program declares fp16": bytes_changed(
        lambda content, offset: put(content, offset + 4, "<I", 4)),
    "2046 bytes are stored, fp16.* takes 2048": bytes_changed(
        lambda content, offset: put(content, offset + 8, "<Q", 2046)),
    "silu .* uses ghost, which nothing before it makes": model_changed(rename_first_use),
    "two operations make": model_changed(repeat_an_output),
    "declares int32.* and holds": model_changed(shorten_a_constant),
    "names a weight file outside the package": model_changed(lambda specification: [
        setattr(op.attributes["val"].blobFileValue, "fileName", "@model_path/../../../../weight.bin")
        for op in small_gpt.operations(specification)
        if op.type == "const" and op.attributes["val"].HasField("blobFileValue")]),
    "the program's outputs are logits, the description's scores": model_changed(
        lambda specification: setattr(specification.description.output[0], "name", "scores")),
    "the program's states are keyCache, valueCache, the description's valueCache": model_changed(
        lambda specification: specification.description.state.pop(0)),
    "has no function main": model_changed(lambda specification: specification.mlProgram.functions.clear()),
    "holds a identity: an ML Program is needed": model_changed(
        lambda specification: specification.identity.SetInParent()),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_package_is_refused_with_its_file_and_its_fault(stateful, tmp_path, message):
    path = tmp_path / "damaged.mlpackage"
    shutil.copytree(stateful, path)
    DAMAGES[message](path)
    with pytest.raises(PackageError, match=message) as error:
        mil.Package(path)
    assert "damaged.mlpackage" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(PackageError, match="is no package: name a folder"):
        program.read(tmp_path / "nothing")


def test_a_package_is_read_as_it_was_written(stateful):
    read = program.read(stateful)
    assert str(read.inputs["inputIds"]) == "int32[1, ?]"
    assert str(read.ranges["inputIds"]) == "[1, 1..24]"
    assert {name: str(type) for name, type in read.states.items()} == {
        "keyCache": "fp16[1, 4, 32, 16]", "valueCache": "fp16[1, 4, 32, 16]"
    }  # fmt: skip
    assert read.outputs == ("logits",) and read.opset == "CoreML8"
    assert read.metadata["com.github.apple.coremltools.source_dialect"] == "TorchScript"
    model = small_gpt.build(True, F.silu)
    stored = read.constants["out_0_weight_to_fp16"].value
    assert np.array_equal(stored.astype(np.float32), model.out[0].weight.numpy())
    assert np.array_equal(mil.Package(stateful).constant("out_0_weight_to_fp16"), model.out[0].weight.numpy())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the cat. " * 20], 1024)


def greedy(stateful: bool, prompt: list[int], most: int) -> list[int]:
    """What torch writes."""
    model = small_gpt.build(False, F.silu if stateful else F.gelu)
    ids = list(prompt)
    for _ in range(most):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["stateful", "stateless"])
def test_the_command_writes_what_torch_writes(kind, request, tokenizer, tmp_path, monkeypatch, capsys):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / mil.MODEL)
    tokenizer.save(tmp_path)
    prompt = [tokenizer.begin_of_text, *tokenizer.encode("the cat")]
    new = greedy(kind == "stateful", prompt, 9)
    assert tokenizer.vocab_size >= VOCAB and tokenizer.end_of_text not in new

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mil", str(tmp_path), *arguments])
        code = mil.main()
        return code, *capsys.readouterr()

    told = ("--prompt", "the cat", "--precision", "fp32")
    text = "the cat" + tokenizer.continuation(prompt, new)
    assert command(*told, "--max-new-tokens", "9") == (0, text + "\n", "")
    # Ends where one of the folder's ends would come
    config = tmp_path / "generation_config.json"
    end = next(place for place, token in enumerate(new) if token != new[0])
    config.write_text(json.dumps({"eos_token_id": [new[end]]}))
    stopped = "the cat" + tokenizer.continuation(prompt, new[:end])
    assert command(*told, "--max-new-tokens", "9") == (0, stopped + "\n", "")
    config.unlink()
    # Ends with the context
    writer = mil.Writer(mil.Package(tmp_path / mil.MODEL))
    assert len(prompt) + len(list(writer.write(prompt, 99, []))) == CONTEXT + 1
    code, out, err = command("--prompt", "the cat sat on the mat " * 20)
    assert (code, out) == (2, "") and err.endswith("use at most the package's 24\n")
    shutil.rmtree(tmp_path / mil.MODEL / "Data")
    code, out, err = command(*told)
    assert (code, out) == (1, "") and err.endswith("model.mlmodel cannot be read: No such file or directory\n")


def test_its_help_loads_neither_torch_nor_coremltools():
    code = "import sys, export.mil, export.parity; sys.exit(bool({'torch', 'coremltools'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
