"""What follows from a shape by arithmetic, against models that are built and counted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.loader import Batch
from models import ModelConfig, build_model
from models.transformer import Transformer
from training.objectives import NextToken

ROOT = Path(__file__).resolve().parents[2]

HELIUM = dict(n_heads=8, n_kv_heads=2, global_every=None)
PUBLISHED = {
    13_439_232: ModelConfig(vocab_size=32000, d_model=256, n_layers=8, d_ff=640, window=64, context=256, **HELIUM),
    42_609_152: ModelConfig(vocab_size=32000, d_model=512, n_layers=10, d_ff=1280, window=128, context=512, **HELIUM),
    1_199_646_720: ModelConfig(
        vocab_size=32768, d_model=2048, n_layers=18, n_heads=16, n_kv_heads=8, d_ff=8192, window=128, global_every=6
    ),
    134_515_008: ModelConfig(
        vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536, window=None, global_every=None
    ),
}


def counted(config):
    """{embedding, hidden, total} parameters of the model, built without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = ("embedding.weight", "position_embedding.weight", "head.weight")
    embedding = sum(parameter.numel() for name, parameter in model.named_parameters() if name in tables)
    assert config.vectors == sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    return {"embedding": embedding, "hidden": total - embedding, "total": total}


@pytest.mark.parametrize("count", PUBLISHED)
def test_published_shapes_have_their_exact_size(count):
    assert PUBLISHED[count].parameters()["total"] == count
    assert counted(PUBLISHED[count]) == PUBLISHED[count].parameters()


@pytest.mark.parametrize(
    "shape",
    [
        {},
        dict(head_dim=20, n_heads=3, n_kv_heads=3),
        dict(d_model=48, n_heads=6, n_kv_heads=1, d_ff=7, n_layers=1, vocab_size=11),
        dict(norm="layer"),
        dict(norm="layer", bias=True),
        dict(bias=True, head_dim=20),
        dict(feed_forward="gelu", bias=True),
        dict(feed_forward="gelu", positions="learned", context=77),
        dict(qk_norm=True, head_dim=24),
        dict(tied_head=False),
        dict(tied_head=False, positions="learned", norm="layer", bias=True, feed_forward="gelu", qk_norm=True),
    ],
)
def test_the_count_is_that_of_the_built_model(shape):
    config = ModelConfig(**shape)
    assert counted(config) == config.parameters()


@pytest.mark.parametrize(
    ("window", "global_every", "expected"),
    [
        (128, 6, [128, 128, 128, 128, 128, None, 128]),
        (64, None, [64] * 7),
        (64, 1, [None] * 7),
        (8, 2, [8, None, 8, None, 8, None, 8]),
        (None, 3, [None] * 7),
    ],
)
def test_layer_windows_and_cache_entries(window, global_every, expected):
    config = ModelConfig(window=window, global_every=global_every, n_layers=7, context=100)
    assert [config.layer_window(layer) for layer in range(7)] == expected
    assert config.cache_entries() == [100 if size is None else min(size, 100) for size in expected]


@pytest.mark.parametrize(("window", "global_every"), [(None, None), (8, None), (8, 3), (64, 2), (100, None)])
def test_flops_a_token_are_those_a_counter_sees(flop_counter, window, global_every):
    """The counter sees each matrix product of a step. Products with weights must agree to the last one. Attention is
    computed over whole blocks and masked: T keys a query in full layers, 2W in windowed ones, where the plan counts
    only visible keys; so the two must agree when the plan's keys are replaced by the blocks'."""
    config = ModelConfig(vocab_size=101, context=64, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, head_dim=6,
                         d_ff=40, window=window, global_every=global_every)  # fmt: skip
    input_ids = torch.randint(101, (2, 64), generator=torch.Generator().manual_seed(0))
    objective = NextToken(build_model(config))
    with sdpa_kernel(SDPBackend.MATH), flop_counter:
        objective(Batch(input_ids, input_ids, torch.zeros_like(input_ids), torch.arange(2)))[0].backward()
    counted_per_token = flop_counter.get_total_flops() / (2 * 64)

    places = torch.arange(64)
    visible = computed = 0.0
    for layer in range(3):
        size = config.layer_window(layer) or 64
        seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - size)
        visible += float(seen.sum()) / 64
        computed += 2 * size if size < 64 else 64
    each_key = 3 * 2 * 2 * config.n_heads * config.d_head  # forward and twice that backward; scores and values
    planned = config.flops_per_token(64)
    assert planned - each_key * visible == pytest.approx(counted_per_token - each_key * computed, abs=1)
    norms = (2 * config.n_layers + 1) * config.d_model
    assert planned == pytest.approx(6 * (counted(config)["total"] - norms) + each_key * visible, abs=1)
    assert ModelConfig(**{**vars(config), "gradient_checkpointing": True}).flops_per_token(64) == planned


def test_flops_of_a_long_context_grow_only_with_global_layers():
    windowed = ModelConfig(window=128, global_every=None)
    mixed = ModelConfig(window=128, global_every=6)
    assert windowed.flops_per_token(8192) < 1.02 * windowed.flops_per_token(1024)
    per_key = 12 * mixed.n_heads * mixed.d_head
    growth = mixed.flops_per_token(8192) - mixed.flops_per_token(1024)
    windowed_growth = windowed.flops_per_token(8192) - windowed.flops_per_token(1024)
    assert growth == pytest.approx(per_key * (8192 - 1024) / 2 + windowed_growth * 5 / 6, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (dict(n_heads=7), ["n_heads", "n_kv_heads"]),
        (dict(n_kv_heads=3), ["n_kv_heads"]),
        (dict(n_heads=7, n_kv_heads=3, d_model=100, window=-3), ["n_heads", "n_kv_heads", "window"]),
        (dict(n_heads=0, n_kv_heads=0, d_model=-1), ["n_heads", "n_kv_heads", "d_model"]),
        (dict(d_model=24, n_heads=8), ["head_dim"]),
        (dict(head_dim=5), ["head_dim"]),
        (dict(n_layers=0, window=0, rope_base=-1.0), ["n_layers", "window", "rope_base"]),
        (dict(architecture="mamba", vocab_size=-1), ["architecture", "vocab_size"]),
        (dict(norm_eps=0.0, global_every=0), ["global_every", "norm_eps"]),
        (dict(embedding_scale=0.0, copy_init=-1.0), ["embedding_scale", "copy_init"]),
        (dict(norm="batch", positions="alibi", dropout=1.0), ["norm", "positions", "dropout"]),
        (dict(head_dim=5, positions="learned"), []),
        ({}, []),
    ],
)
def test_impossible_shapes_are_named_all_at_once(change, keys):
    config = ModelConfig(**change)
    assert sorted(key for key, *_ in config.problems()) == sorted(keys)
    if keys:
        with pytest.raises(ValueError) as error:
            build_model(config)
        assert all(key in str(error.value) and repr(getattr(config, key)) in str(error.value) for key in keys)


def test_plans_do_not_wait_for_torch():
    plan = "models.ModelConfig().parameters()"
    code = f"import sys, models, models.inference.sampling; {plan}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (dict(dropout=0.5, copy_init=2.0, gradient_checkpointing=True), True),
        (dict(context=77), True),
        (dict(context=77, positions="learned"), False),
        (dict(head_dim=32), True),  # what d_model / n_heads is
        (dict(head_dim=16), False),
        (dict(rope_base=5.0), False),
        (dict(rope_base_global=5.0), False),
        (dict(norm_eps=1e-5), False),
        (dict(embedding_scale=2.0), False),
    ],
)
def test_identity_is_what_weights_mean(change, same):
    config = ModelConfig(positions=change.get("positions", "rope"))
    assert (config.identity() == ModelConfig(**change).identity()) == same


def test_what_no_layer_uses_is_no_part_of_the_identity():
    full = dict(window=None)
    assert ModelConfig(**full).identity() == ModelConfig(**full, rope_base=5.0, global_every=None).identity()
    windowed = dict(global_every=None)
    assert ModelConfig(**windowed).identity() == ModelConfig(**windowed, rope_base_global=5.0).identity()
    assert ModelConfig(window=None).identity() == ModelConfig(window=8, global_every=1).identity()
