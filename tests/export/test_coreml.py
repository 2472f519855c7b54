"""Core ML packages of three shapes compute what their models do, and whatever else than the model's is in a package, or
comes of how it is used, is caught by name."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export import ExportFault, Options, bundle, coreml, traced
from export.check import check, split
from export.mil import Package, Writer
from export.parity import GRAPH, ROUNDING, Bounds, compare
from export.trained import Trained
from models import ModelConfig
from tests.small_models import PUBLISHED, build_awake, narrow, published
from tokenizer import Tokenizer

COMMON = dict(vocab_size=1030, context=64, n_layers=2, d_model=64, n_heads=4, d_ff=80)
SHAPES = {
    "gpt2": ModelConfig(
        **COMMON, n_kv_heads=4, positions="learned", norm="layer", feed_forward="gelu", bias=True, window=None,
        global_every=None, norm_eps=1e-5,
    ),
    "mixed": ModelConfig(
        **COMMON, n_kv_heads=2, window=8, global_every=2, rope_base=100.0, rope_base_global=10_000.0,
        embedding_scale=7.5,
    ),
    "normalised": ModelConfig(
        **COMMON, n_kv_heads=2, head_dim=16, qk_norm=True, tied_head=False, window=8, global_every=2,
    ),
}  # fmt: skip


def trained_as(config: ModelConfig) -> Trained:
    """A checkpoint as `export.trained.load` gives it, of a small vocabulary with rows that only pad it."""
    tokenizer = Tokenizer.train([" ".join(bundle.GOLDEN_TEXTS.values())], 1024)
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    model = build_awake(config).requires_grad_(False)
    if model.head is not None:
        model.head.weight.mul_(0.5 / model.head.weight.std())  # logits that spread, as those of a tied head
    begin, end = [tokenizer.begin_of_text], tokenizer.end_of_text
    return Trained(Path("run"), model, tokenizer, config, begin, [end], [1, *padding], chats=False)


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, tmp_path_factory):
    """A shape's checkpoint and its package."""
    trained = trained_as(SHAPES[request.param])
    path = tmp_path_factory.mktemp(request.param) / coreml.PACKAGE
    coreml.convert(trained.model, never=trained.never).save(str(path))
    return trained, path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The checkpoint of mixed windows and its package as coremltools has it in memory, and where it is saved."""
    trained = trained_as(SHAPES["mixed"])
    package = coreml.convert(trained.model, never=trained.never)
    path = tmp_path_factory.mktemp("mixed") / coreml.PACKAGE
    package.save(str(path))
    return trained, package, path


def test_a_package_computes_what_its_model_does(exported):
    """No missing operation, no shape but the declared, no number that is none, a second text after a new state, the
    end of the context: else `check` raises."""
    trained, path = exported
    found = check(path, trained)
    assert found["graph"]["relative"] <= GRAPH.relative and found["fp16"]["mean_kl"] <= ROUNDING.mean_kl
    assert found["fp16"]["top1_clear"] >= 0.99 and found["fp16"]["clear"] > 20
    assert not found["rounding_out_of_bounds"]
    types = Package(path).program.types()
    squares = [name for name in types if "norm" in name and types[name].dtype == "fp16"]
    assert not squares, "norms are in fp32"


def test_past_the_end_it_goes_on_as_the_traced_form_does(mixed):
    trained, _, path = mixed
    writer, decoder = Writer(Package(path)), traced.Decoder(trained.model, trained.never)
    for part in split(list(range(20, 20 + 72)), [60, 3, 5, 1, 3]):  # the context is 64
        expected = decoder(torch.tensor([part], dtype=torch.int32))[0].numpy()
        assert not compare(expected, writer.logits(part)).problems(Bounds(max_abs=0.05))


@pytest.mark.parametrize(("quantized", "size"), [("int8", 0.55), ("int4", 0.35), ("palette4", 0.35)])
def test_weights_in_fewer_bits(mixed, tmp_path, quantized, size):
    """Smaller by as much as is promised, tables and norms aside, which stay; and no wrong weight among them."""
    if quantized == "palette4":
        pytest.importorskip("sklearn", reason="palettes are found with scikit-learn")
    trained, package, path = mixed
    small = tmp_path / "small.mlpackage"
    coreml.quantize(package, quantized).save(str(small))
    found = check(small, trained, quantized)
    assert found["against_checkpoint"]["mean_kl"] > 10 * found["fp16"]["mean_kl"]  # it is quantised
    before, after = (next(folder.rglob("weight.bin")).stat().st_size for folder in (path, small))
    tables = 4 * 64 * 16 * 2
    assert after - tables < size * (before - tables) + 64 * 100  # every constant fills up 64 bytes
    with pytest.raises(ExportFault, match="is quantised, and nobody asked for it"):
        check(small, trained)


def test_without_states(mixed, tmp_path):
    trained, _, _ = mixed
    whole = coreml.convert(trained.model, stateless=True, never=trained.never)
    whole.save(str(tmp_path / "whole.mlpackage"))
    assert not Package(tmp_path / "whole.mlpackage").program.states
    check(tmp_path / "whole.mlpackage", trained)


def test_what_swift_transformers_asks_of_a_package(mixed):
    _, _, path = mixed
    assert coreml.swift_problems(Package(path).program) == []


# Planted faults. Each takes (trained, path), where path is a copy, and makes one thing wrong.


def flipped_bit(trained, path, monkeypatch):
    """The lowest bit of one weight."""
    value = trained.model.blocks[1].feed_forward.up.weight.detach().numpy().astype(np.float16).tobytes()
    file = next(path.rglob("weight.bin"))
    content = bytearray(file.read_bytes())
    place = content.find(value)
    assert place > 0
    content[place + 100] ^= 1
    file.write_bytes(content)


def tables_of_the_wrong_base(trained, path, monkeypatch):
    model = trained.model
    model.rotary_local.cos, model.rotary_global.cos = model.rotary_global.cos, model.rotary_local.cos
    model.rotary_local.sin, model.rotary_global.sin = model.rotary_global.sin, model.rotary_local.sin


def another_window(trained, path, monkeypatch):
    for block in trained.model.blocks:
        if block.attention.window:
            block.attention.window += 1


def position_off_by_one(trained, path, monkeypatch):
    """After each call the state has seen one token too few."""

    def behind(state):
        state["valueCache"][0, 0, -1, 0] -= 1

    changed(monkeypatch, behind)


def changed(monkeypatch, change):
    """`change` is done to the state after every prediction."""
    predict = Package.predict

    def wrong(self, inputs, state=None):
        outputs = predict(self, inputs, state)
        change(state)
        return outputs

    monkeypatch.setattr(Package, "predict", wrong)


def states_swapped(trained, path, monkeypatch):
    def swap(state):
        state["keyCache"], state["valueCache"] = state["valueCache"].copy(), state["keyCache"].copy()

    changed(monkeypatch, swap)


def chunk_in_the_wrong_order(trained, path, monkeypatch):
    """A long chunk's last tokens lie in the ring, but one place further."""

    def roll(state):
        ring = state["keyCache"][:, :, :8]
        ring[:] = np.roll(ring, 1, axis=2)

    changed(monkeypatch, roll)


def state_not_reset(trained, path, monkeypatch):
    new_state = Package.new_state
    monkeypatch.setattr(Package, "new_state", lambda self: self.__dict__.setdefault("kept", new_state(self)))


FAULTS = {
    flipped_bit: "weights are not the checkpoint's: blocks.1.feed_forward.up.weight is off by",
    tables_of_the_wrong_base: "weights are not the checkpoint's: rotary_local.cos is off by",
    another_window: "the graph computes something else",
    position_off_by_one: "the graph computes something else",
    states_swapped: "the graph computes something else",
    chunk_in_the_wrong_order: "the graph computes something else",
    state_not_reset: "a second text, with a new state, computes something else",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_by_name(mixed, fault, tmp_path, monkeypatch):
    _, _, good = mixed
    trained = trained_as(SHAPES["mixed"])
    path = tmp_path / coreml.PACKAGE
    shutil.copytree(good, path)
    fault(trained, path, monkeypatch)
    with pytest.raises(ExportFault, match=FAULTS[fault]):
        check(path, trained)


def test_a_quantised_table_is_caught_by_name(mixed, tmp_path, monkeypatch):
    trained, package, _ = mixed
    monkeypatch.setattr(coreml, "_is_quantized", lambda name, about: True)
    monkeypatch.setattr(coreml, "LEAST_QUANTIZED", 100)
    coreml.quantize(package, "int8").save(str(tmp_path / "p.mlpackage"))
    with pytest.raises(ExportFault, match="rotary_(local|global).(cos|sin) is quantised, and no matrix of weights"):
        check(tmp_path / "p.mlpackage", trained, "int8")


def test_positions_in_fp16_are_caught_by_name(tmp_path, monkeypatch):
    """coremltools computes `clamp` of integers in floating point."""
    config = dataclasses.replace(SHAPES["mixed"], context=4096)
    trained = trained_as(config)
    monkeypatch.setattr(traced, "_at_most", lambda positions, most: positions.clamp(max=most))
    coreml.convert(trained.model, never=trained.never).save(str(tmp_path / "p.mlpackage"))
    with pytest.raises(ExportFault, match="the end of the context computes something else"):
        check(tmp_path / "p.mlpackage", trained)


def test_a_tokenizer_without_its_beginning_is_caught_by_name(tmp_path):
    trained = trained_as(SHAPES["mixed"])
    bundle._tokenizer(trained, tmp_path)
    bundle._check_tokenizer(trained, tmp_path)
    trained.tokenizer._states_begin, trained.tokenizer.declares_begin = False, True
    bundle._tokenizer(trained, tmp_path)
    with pytest.raises(ExportFault, match="tokenizer.json gives other ids for the golden text 'story'"):
        bundle._check_tokenizer(trained, tmp_path)


def test_problems_and_room():
    trained = trained_as(SHAPES["mixed"])
    assert coreml.problems(trained, Options()) == []
    assert coreml.room(trained, Options(quantize="int8")) > 4 * trained.config.parameters()["total"]


@pytest.mark.campaign
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_recipe_in_every_form(recipe, tmp_path):
    """At its real depth, pattern, heads and context, with a small width."""
    trained = trained_as(dataclasses.replace(narrow(published(recipe)), vocab_size=1030))
    for stateless in (False, True):
        package = coreml.convert(trained.model, stateless=stateless, never=trained.never)
        for name, form in (("none", package), ("int8", coreml.quantize(package, "int8"))):
            path = tmp_path / f"{name}-{stateless}.mlpackage"
            form.save(str(path))
            found = check(path, trained, None if name == "none" else name)
            assert found["graph"]["relative"] <= GRAPH.relative and not found["rounding_out_of_bounds"]
