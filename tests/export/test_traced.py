"""The traced forms compute what `model.step` does, for every recipe, in chunks of any length up to the end of the
context and past it; recorded once, they serve every length."""

import dataclasses
import warnings

import pytest
import torch

from export.traced import CacheLayout, Decoder, Stateless, TracedState, set_position
from models import ModelConfig
from tests.small_models import build_awake

EXACT = 1e-5  # of logits of size 1
MIXED = ModelConfig(
    vocab_size=61, context=70, n_layers=4, d_model=24, n_heads=4, n_kv_heads=2, d_ff=32, window=8, global_every=2,
    rope_base=100.0, embedding_scale=5.0,
)  # fmt: skip


class Full:
    """A layer's memory at the end of the context: it shows what it has, and takes nothing in."""

    def __init__(self, memory):
        self.memory = memory

    def extend(self, key, value, state):
        return self.memory.keys, self.memory.values, None


def chunks(config, rest=None):
    """Lengths from the beginning: longer than a window, single, short; then `rest`, or what fills the context; then
    lengths that pass its end, the first of them by its second half."""
    window = min(config.window or 64, config.context // 2)
    lengths = [window + 3, 1, 1, 5, window // 2]
    return [*lengths, config.context - sum(lengths) - 3 if rest is None else rest], [2, 4, 1, 3]


def reference(model, ids, lengths, state=None):
    """Logits [1, T, V] by `model.step`; past the end each token stands at the last position and is not remembered."""
    state = state or model.new_state(1)
    context, begun, start, logits = model.config.context, state.length, 0, []
    for length in lengths:
        inside = max(0, min(length, context - begun - start))
        if inside:
            logits.append(model.step(ids[:, start : start + inside], state))
        for place in range(start + inside, start + length):
            if not isinstance(state.layers[0], Full):
                state.layers = [Full(memory) for memory in state.layers]
            state.length = context - 1
            logits.append(model.step(ids[:, place : place + 1], state))
        start += length
    return torch.cat(logits, dim=1)


def near_the_end(model, decoder, before):
    """A state that has seen all of the context but `before` tokens, its caches full of random numbers; `decoder`
    becomes the same."""
    state, generator = model.new_state(1), torch.Generator().manual_seed(0)
    state.hold(model.config.context)
    state.length = model.config.context - before
    for cache, name in ((decoder.keyCache, "keys"), (decoder.valueCache, "values")):
        parts = cache.split([*decoder.layout.entries, decoder.layout.spare], dim=2)
        for part, memory in zip(parts, state.layers, strict=False):
            part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype))
            getattr(memory, name).copy_(part)
    set_position(decoder.keyCache, decoder.valueCache, state.length)
    return state


def in_chunks(decoder, ids, lengths):
    return torch.cat([decoder(part) for part in ids.int().split(lengths, dim=1)], dim=1)


def some_ids(config, length, seed=0):
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def recorded(form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is constant in a trace is meant to be: heads, tables
        module = torch.jit.trace(form, torch.zeros(1, 2, dtype=torch.int32), check_trace=False)
    if isinstance(form, Decoder):
        form.reset()  # recording ran it, and the buffers are shared
    return module


def test_every_recipe_decodes_as_its_model_to_the_end_and_past_it(awake_recipe):
    """In float64, so that thirty layers' rounding does not hide a fault. What a step computes depends on the state
    alone: instead of two thousand tokens, random numbers lie before the end."""
    beginning, ending = chunks(awake_recipe.config, rest=9)
    ids = some_ids(awake_recipe.config, sum(beginning))
    expected, decoder = reference(awake_recipe, ids, beginning), Decoder(awake_recipe, dtype=torch.float64)
    assert (in_chunks(decoder, ids, beginning) - expected).abs().max() <= EXACT
    whole = Stateless(awake_recipe)(ids.int())
    assert (whole - expected).abs().max() <= EXACT
    state = near_the_end(awake_recipe, decoder, before=3)
    last = some_ids(awake_recipe.config, sum(ending), seed=1)
    expected = reference(awake_recipe, last, ending, state)
    assert (in_chunks(decoder, last, ending) - expected).abs().max() <= EXACT


def test_a_text_that_fills_the_context_goes_on_past_its_end():
    model = build_awake(MIXED)
    lengths = sum(chunks(MIXED), [])
    ids = some_ids(MIXED, sum(lengths))
    assert (in_chunks(Decoder(model), ids, lengths) - reference(model, ids, lengths)).abs().max() <= EXACT


@pytest.mark.parametrize("qk_norm", (False, True))
def test_a_recording_serves_every_length(qk_norm):
    model = build_awake(dataclasses.replace(MIXED, qk_norm=qk_norm))
    lengths = sum(chunks(MIXED), [])
    ids = some_ids(MIXED, sum(lengths))
    expected = reference(model, ids, lengths)
    decoder = recorded(Decoder(model))
    assert (in_chunks(decoder, ids, lengths) - expected).abs().max() <= EXACT
    whole = recorded(Stateless(model))
    for length in (1, 9, MIXED.context):
        assert (whole(ids[:, :length].int()) - expected[:, :length]).abs().max() <= EXACT


def test_torch_export_records_it_too():
    """The road to Core AI and others: no branch on a value, no slice at a computed position."""
    model = build_awake(MIXED)
    lengths = [11, 2, 28, 5]
    ids = some_ids(MIXED, sum(lengths))
    length = torch.export.Dim("q", min=2, max=MIXED.context)
    program = torch.export.export(Decoder(model), (torch.zeros(1, 3, dtype=torch.int32),), dynamic_shapes=[{1: length}])
    assert (in_chunks(program.module(), ids, lengths) - reference(model, ids, lengths)).abs().max() <= EXACT


def test_a_new_text_begins_with_caches_of_zeros():
    model = build_awake(MIXED)
    first, second = some_ids(MIXED, 40), some_ids(MIXED, 40, seed=1)
    fresh = in_chunks(Decoder(model), second, [20, 1, 19])
    decoder = Decoder(model)
    in_chunks(decoder, first, [40])
    assert not torch.equal(in_chunks(decoder, second, [20, 1, 19]), fresh)  # a reset is needed, and shows
    decoder.reset()
    assert torch.equal(in_chunks(decoder, second, [20, 1, 19]), fresh)


def test_tokens_that_are_never_drawn_are_lowered():
    model = build_awake(MIXED)
    ids = some_ids(MIXED, 5).int()
    plain, lowered = Stateless(model)(ids), Stateless(model, never=[3, 60])(ids)
    assert lowered[..., [3, 60]].max() < -29_000
    kept = [token for token in range(61) if token not in (3, 60)]
    assert torch.equal(lowered[..., kept], plain[..., kept])


def test_the_position_is_exact_in_fp16_caches():
    """At 2,049 fp16 has no number of its own for the next position."""
    model = build_awake(ModelConfig(vocab_size=61, context=4100, n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_ff=8,
                                    window=8, global_every=None))  # fmt: skip
    half, full = Decoder(model, dtype=torch.float16), Decoder(model)
    for length in (2047, 1, 1, 1, 2000, 1, 1):
        ids = some_ids(model.config, length, seed=length)
        assert (half(ids.int()) - full(ids.int())).abs().max() < 0.01
    assert TracedState(half.layout, half.keyCache, half.valueCache, half.place).length.tolist() == [4052]


def test_caches_are_as_wide_as_the_layers_look_back():
    layout = CacheLayout.of(MIXED)
    assert layout.entries == (8, 70, 8, 70)
    assert layout.shape == (1, 2, 160, 6)  # 156 and one for the position, a multiple of 32
