"""MLX folders: mlx-lm, in its build for CPUs, computes what the checkpoint does, past the window and token by token;
classes that load and drop the window are found out."""

import itertools
import json

import numpy as np
import pytest
import torch

from export import Options, bundle, mlx
from export.parity import GRAPH, Bounds, compare
from tests.export.stock_models import RECIPES, recipe, trained_as

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install -r requirements-dev.txt")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install -r requirements-dev.txt")
utils = pytest.importorskip("mlx_lm.utils")
generate_step = pytest.importorskip("mlx_lm.generate").generate_step

SAME = Bounds(relative=GRAPH.relative, top1=0.99)
PAST = 256  # tokens past the window
CASES = {
    "smollm-135m": (recipe("smollm-135m"), "llama"),
    "slm-tinystories": (recipe("slm-tinystories"), "gpt2"),
    "flow-1b": (recipe("flow-1b"), "mimo_v2_flash"),
    "flow-qwen": (recipe("flow-qwen"), "mellum"),
    "config.yaml": (recipe("../config"), "mimo_v2_flash"),
    "tinystories-cpu, one base": (recipe("tinystories-cpu", rope_base_global=1e4), "llama"),
    "normalised, no windows": (
        recipe("flow-qwen", window=None, n_layers=6, embedding_scale=1.7, norm_eps=1e-3), "qwen3"
    ),
}
HOMELESS = {"helium-13m": "model.global_every=8", "helium-nano-45m": "model.global_every=10",
            "smolm135": "model.positions=rope"}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    config, kind = CASES[request.param]
    trained, folder = trained_as(config), tmp_path_factory.mktemp("mlx") / "out"
    return trained, folder, bundle.export(trained, "mlx", Options(dtype="float32"), folder), kind


def asked(trained):
    """Ids up to 256 past the window, and the checkpoint's logits."""
    window = trained.config.layer_window(0) or 0
    ids = np.random.default_rng(0).integers(2, trained.tokenizer.vocab_size, window + PAST).tolist()
    return ids, trained.model(torch.tensor([ids]))[0].numpy()


def test_mlx_computes_what_the_checkpoint_does(exported):
    trained, folder, report, kind = exported
    ids, expected = asked(trained)
    assert report["home"]["class"] == kind and report["parity"]["graph"]["relative"] <= GRAPH.relative
    assert not compare(expected, mlx.logits(folder, ids)).problems(SAME)


def test_a_client_loads_it_with_its_tokenizer_and_writes_the_same(exported):
    """Greedily, through mlx-lm's own generation."""
    trained, folder, _, _ = exported
    model, known = mlx_lm.load(str(folder))
    prompt = known.encode("One day")
    assert prompt == trained.begin + trained.tokenizer.encode("One day")
    assert known.eos_token_ids == {trained.end}
    found = [int(token) for token, _ in itertools.islice(generate_step(mx.array(prompt), model, max_tokens=12), 12)]
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(trained.model(torch.tensor([ids]))[0, -1].argmax()))
    assert found == ids[len(prompt) :]


@pytest.mark.parametrize("name", ["flow-1b", "flow-qwen"])
def test_token_by_token_with_its_caches(name, tmp_path):
    """A prompt longer than the window, then single tokens, as a client generates."""
    trained = trained_as(recipe(name, n_layers=6))
    bundle.export(trained, "mlx", Options(dtype="float32"), tmp_path / "out")
    ids, expected = asked(trained)
    ids, expected = ids[:170], expected[:170]
    model, _ = utils.load_model(tmp_path / "out")
    cache = model.make_cache()
    parts = [ids[:100], ids[100:140], *([token] for token in ids[140:])]
    found = np.concatenate([np.array(model(mx.array([part]), cache=cache)[0]) for part in parts])
    assert not compare(expected, found).problems(SAME)


def test_in_fp16_by_default(tmp_path):
    trained = trained_as(recipe("../config"))
    report = bundle.export(trained, "mlx", Options(), tmp_path / "out")
    assert report["dtype"] == "float16" and not report["parity"]["rounding_out_of_bounds"]
    model, _ = utils.load_model(tmp_path / "out")
    assert model.model.embed_tokens.weight.dtype == mx.float16


WRONG = {  # (recipe, keys that make it another home)
    "mistral, which is a llama there": (recipe("tinystories-cpu", rope_base_global=1e4), {
        "model_type": "mistral", "layer_types": None}),
    "a llama without layer_types": (recipe("tinystories-cpu", rope_base_global=1e4), {"layer_types": None}),
    "a window one larger": (recipe("flow-1b", n_layers=6), {"sliding_window_size": 129}),
    "a window as transformers counts it": (recipe("flow-1b", n_layers=6), {"sliding_window_size": 127}),
    "bases swapped": (recipe("flow-1b", n_layers=6), {"rope_theta": 1e4, "swa_rope_theta": 1e6}),
    "mellum with one base": (recipe("flow-qwen", n_layers=6), {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e6} for kind in ("full_attention", "sliding_attention")}}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_home_loads_and_is_found_out(wrong, tmp_path):
    shape, keys = WRONG[wrong]
    trained, file = trained_as(shape), tmp_path / "out" / "config.json"
    bundle.export(trained, "mlx", Options(dtype="float32"), tmp_path / "out")
    ids, expected = asked(trained)
    config = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in config.items() if keys.get(key, key) is not None}))
    assert compare(expected, mlx.logits(tmp_path / "out", ids)).problems(SAME)


@pytest.mark.parametrize("name", HOMELESS)
def test_what_has_no_home_is_refused_with_the_option(name):
    (problem,) = mlx.problems(trained_as(recipe(name)), Options())
    assert problem.endswith(f"; trained with {HOMELESS[name]} it would have one")


def test_every_recipe_has_a_home_or_is_refused():
    homeless = {name for name in RECIPES if mlx.problems(trained_as(recipe(name)), Options())}
    assert homeless == set(HOMELESS)
