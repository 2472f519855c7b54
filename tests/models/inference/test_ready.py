"""Smaller weights for decoding: how far they are from the real ones, and that they decode as their own full pass."""

import pytest
import torch

from models import ModelConfig
from models.inference.decoding import generate
from models.inference.quantized import Int8Linear, quantize
from models.inference.ready import for_decoding
from models.inference.sampling import Sampling

SMALL = ModelConfig(vocab_size=512, context=96, n_layers=4, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, window=8,
                    global_every=3)  # fmt: skip
OPTIONS = dict(norm="layer", feed_forward="gelu", positions="learned", bias=True, tied_head=False, qk_norm=True)


def test_int8_rows_are_off_by_half_a_step_at_most():
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    rows, scale = quantize(weight)
    assert rows.dtype == torch.int8 and rows.abs().amax(dim=1).eq(127).all()
    assert ((rows * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()
    assert torch.equal(quantize(torch.zeros(2, 3))[0], torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 64), (7, 64), (1, 40), (5, 33), (9, 100), (2, 48)])
def test_the_int8_product_is_that_of_the_dequantised_weights(shape, bias):
    """For any width: torch's kernel reads on past the end of rows whose width it does not expect."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(97, shape[-1], generator=generator), torch.randn(shape, generator=generator)
    offset = torch.randn(97, generator=generator) if bias else None
    rows, scale = quantize(weight)
    expected = torch.nn.functional.linear(x, rows * scale[:, None], offset)
    found = Int8Linear(rows, scale, offset)(x)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() < 0.02 * expected.std()  # activations are rounded to bf16


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, OPTIONS])
@pytest.mark.parametrize(("weights", "error"), [("bf16", 0.05), ("int8", 0.08)])
def test_logits_stay_close_and_the_cache_agrees_with_the_full_pass(awake, options, weights, error):
    config = ModelConfig(**{**vars(SMALL), **options})
    input_ids = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(0))
    plain = awake(config)(input_ids)
    model = for_decoding(awake(config), weights)
    found = model(input_ids).float()
    assert 0 < (found - plain).std() < error * plain.std()
    state = model.new_state(2)
    parts = [model.step(part, state).float() for part in input_ids.split([21, 1, 1, 30, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), found, rtol=0.05, atol=0.05 * float(plain.std()))


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [0, 7]])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"bias": True}, {"qk_norm": True}])
def test_joined_matrices_give_what_their_parts_give(awake, options, padding):
    """With fp32 weights nothing but the number of products changes, whole and from the cache."""
    config = ModelConfig(**{**vars(SMALL), **options})
    input_ids = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(0))
    plain, joined = awake(config), for_decoding(awake(config), "fp32")
    assert len(list(joined.parameters())) < len(list(plain.parameters()))
    torch.testing.assert_close(joined(input_ids), plain(input_ids), rtol=1e-4, atol=1e-5)
    states = [model.new_state(2, None if padding is None else torch.tensor(padding)) for model in (plain, joined)]
    for part in input_ids.split([21, 1, 1, 30, 7], dim=1):
        expected, found = (model.step(part, state) for model, state in zip((plain, joined), states, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weights", "share"), [("fp32", 1), ("bf16", 0.5), ("int8", 0.27)])
def test_the_weights_take_the_memory_that_their_name_says(awake, weights, share):
    model = for_decoding(awake(SMALL), weights)
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    tables = sum(t.nbytes for t in model.rotary_local.buffers()) * 2
    assert (sum(held.values()) - tables) / (4 * SMALL.parameters()["total"]) == pytest.approx(share, rel=0.06)
    assert len({t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}) == 1
    assert len(generate(model, [[1, 2, 3]], 20, sampling=Sampling(temperature=0))[0]) == 20


def test_positions_are_never_rounded(awake):
    model = awake(SMALL)
    before = model.rotary_global.cos.clone()
    model.bfloat16()
    assert model.rotary_global.cos.dtype == torch.float32 and torch.equal(model.rotary_global.cos, before)
