"""Decoding: the cache against the full forward pass, the sampling filters against their definitions, generation."""

import math
import random

import pytest
import torch

from models import ModelConfig, transformer
from models import state as state_of_models
from models.compilation import compile_steps
from models.inference import decoding
from models.inference.decoding import draw, filter_logits, generate, prefill
from models.inference.ready import for_decoding
from models.inference.sampling import Sampling

SMALL = ModelConfig(vocab_size=61, context=96, n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=8,
                    global_every=3, embedding_scale=1.5)  # fmt: skip
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def small(awake):
    return awake(SMALL)


def tokens(config, length=None, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.context), generator=generator)


def steps(model, input_ids, state, sizes):
    """Logits [B, T, V] of feeding `input_ids` in parts of the given sizes, then one by one."""
    length = input_ids.shape[1]
    sizes = [*sizes, *[1] * (length - sum(sizes))]
    return torch.cat([model.step(part, state) for part in input_ids.split(sizes, dim=1)], dim=1)


def assert_same_logits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# The cache


@torch.no_grad()
def test_cached_decoding_equals_the_full_pass_up_to_the_context_end(recipe, awake_recipe):
    """In odd chunks, some longer than the window and some shorter, then token by token past the window."""
    input_ids, window, context = tokens(recipe), recipe.window or 64, recipe.context
    expected = awake_recipe(input_ids)
    odd = [window // 3, window + 1, 1, window - 1]
    while sum(odd) < context - window - 9:
        odd.append(min(333, context - window - 9 - sum(odd)))
    for sizes in (odd, [context - 1]):
        state = awake_recipe.new_state(1)
        assert_same_logits(steps(awake_recipe, input_ids, state, sizes), expected)
        assert state.length == context


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[], [96], [7], [8], [9], [50], [3, 8, 20], [1, 5, 17, 2, 9]])
def test_any_cut_into_chunks_gives_the_same_logits(small, sizes):
    input_ids = tokens(SMALL, batch=3)
    assert_same_logits(steps(small, input_ids, small.new_state(3), sizes), small(input_ids))


@torch.no_grad()
@pytest.mark.parametrize(("window", "global_every"), [(1, None), (5, 1), (96, None), (500, 2), (None, None)])
def test_every_kind_of_layer_can_be_cached(awake, window, global_every):
    model = awake(ModelConfig(**{**vars(SMALL), "window": window, "global_every": global_every}))
    input_ids = tokens(SMALL)
    assert_same_logits(steps(model, input_ids, model.new_state(1), [11, 30]), model(input_ids))


@torch.no_grad()
def test_a_windowed_layer_keeps_a_ring_of_window_entries(recipe, awake_recipe):
    state = awake_recipe.new_state(2)
    windows = [recipe.layer_window(layer) for layer in range(recipe.n_layers)]
    rings = [cache for cache, window in zip(state.layers, windows, strict=True) if window]
    before = [(cache.keys.data_ptr(), cache.values.data_ptr()) for cache in rings]
    window = recipe.window or 64
    fed = 2 * window + 9
    steps(awake_recipe, tokens(recipe, fed, batch=2), state, [window + 3])
    assert [(cache.keys.data_ptr(), cache.values.data_ptr()) for cache in rings] == before
    for cache, of_layer in zip(state.layers, windows, strict=True):
        sizes = {tensor.untyped_storage().nbytes() for tensor in (cache.keys, cache.values)}
        an_entry = 2 * recipe.n_kv_heads * recipe.d_head * 4
        least, most = (of_layer, of_layer) if of_layer else (min(fed, recipe.context), min(2 * fed, recipe.context))
        assert len(sizes) == 1 and least * an_entry <= sizes.pop() <= most * an_entry
    if recipe.window is None:
        assert not rings
    else:
        assert windows.count(None) == (recipe.n_layers // recipe.global_every if recipe.global_every else 0)


LONG = {"context": 2**20, "window": 8, "global_every": 2}


@torch.no_grad()
def test_newcomer_five_tokens_of_a_very_long_context_take_little_memory(awake, monkeypatch):
    """Whether they are fed one by one or written by `generate`, which was allowed a million."""
    model = awake(ModelConfig(**{**vars(SMALL), **LONG}))
    states = []
    new_state = model.new_state
    monkeypatch.setattr(model, "new_state", lambda *how: states.append(new_state(*how)) or states[-1])
    steps(model, tokens(SMALL, 5), model.new_state(1), [])
    written = generate(model, [[1, 2]], 3, sampling=GREEDY)[0]
    assert generate(model, [[1, 2]], 1_000_000, written[-1:], GREEDY)[0] == written[: written.index(written[-1])]
    for state, most in zip(states, (64, 64, 320), strict=True):
        an_entry = 2 * SMALL.n_kv_heads * SMALL.d_head * 4
        of_layers = [cache.keys.nbytes + cache.values.nbytes for cache in state.layers]
        assert all(size <= most * an_entry for size in of_layers) and of_layers[0] == 8 * an_entry
    assert sum(table.nbytes for table in model.buffers()) == 2 * 2 * 32_768 * SMALL.d_head * 4


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [9, 0, 30]])
def test_caches_and_tables_that_grow_change_no_bit(awake, monkeypatch, padding):
    input_ids = tokens(SMALL, batch=3)
    padding = None if padding is None else torch.tensor(padding)
    whole = awake(SMALL)
    monkeypatch.setattr(transformer, "FIRST_ROWS", 8)
    monkeypatch.setattr(state_of_models, "GRAIN", 1)
    grown = awake(SMALL)
    assert len(grown.rotary_global.cos) == 8
    at_once = whole.new_state(3, padding)
    at_once.hold(SMALL.context)
    by_and_by = grown.new_state(3, padding)
    sizes = [3, 1, 1, 1, 20, 1, 1]
    assert torch.equal(steps(grown, input_ids, by_and_by, sizes), steps(whole, input_ids, at_once, sizes))
    assert [cache.keys.shape[2] for cache in by_and_by.layers] == [8, 8, 96, 8]
    assert torch.equal(grown(input_ids), whole(input_ids)) and len(grown.rotary_global.cos) == SMALL.context
    grown.train()(input_ids).sum()  # a table that grew where nothing is recorded can be trained with


@torch.no_grad()
def test_a_full_ring_takes_a_token_without_copying(small, recorder):
    """One more token makes no tensor as large as the global layer's cache, nor a mask."""
    state = small.new_state(1)
    small.step(tokens(SMALL, 80), state)
    with recorder:
        small.step(tokens(SMALL, 1), state)
    assert recorder.largest <= max(SMALL.vocab_size * SMALL.d_model, state.layers[2].keys.numel())


@torch.no_grad()
def test_left_padded_batches_equal_batches_of_one(recipe, awake_recipe):
    """Prompts shorter and longer than the window, prefilled in odd chunks, then token by token past the window."""
    window = recipe.window or 64
    longest, new = 2 * window + 5, window // 2 + 3
    padding = torch.tensor([0, longest - 1, window, window + 7, longest - window])
    padded = tokens(recipe, longest + new, batch=5)
    expected = [awake_recipe(row[None, pad:])[0] for row, pad in zip(padded, padding.tolist(), strict=True)]
    state = awake_recipe.new_state(5, padding)
    logits = prefill(awake_recipe, padded[:, :longest], state, chunk=window // 2 + 3)
    for row, pad in enumerate(padding.tolist()):
        assert_same_logits(logits[row], expected[row][longest - 1 - pad])
    decoded = steps(awake_recipe, padded[:, longest:], state, [])
    for row, pad in enumerate(padding.tolist()):
        assert_same_logits(decoded[row], expected[row][longest - pad :])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 8, 9, 512])
def test_padding_may_be_fed_in_chunks_of_any_size(small, chunk):
    padded, padding = tokens(SMALL, 40, batch=3), torch.tensor([39, 0, 13])
    logits = prefill(small, padded, small.new_state(3, padding), chunk)
    for row, pad in enumerate(padding.tolist()):
        assert_same_logits(logits[row], small(padded[row : row + 1, pad:])[0, -1])


@torch.no_grad()
def test_what_the_padding_holds_does_not_matter(small):
    padded, padding = tokens(SMALL, 30, batch=2), torch.tensor([11, 0])
    other = padded.clone()
    other[0, :11] = 5
    found = [steps(small, ids, small.new_state(2, padding), [20]) for ids in (padded, other)]
    assert torch.equal(found[0][0, 11:], found[1][0, 11:])
    assert torch.equal(found[0][1], found[1][1])


@torch.no_grad()
def test_a_step_past_the_context_is_refused_and_changes_nothing(small):
    input_ids = tokens(SMALL)
    state = small.new_state(1)
    small.step(input_ids[:, :90], state)
    with pytest.raises(ValueError, match="90 \\+ 7 tokens .* context of 96"):
        small.step(input_ids[:, :7], state)
    assert_same_logits(small.step(input_ids[:, 90:], state), small(input_ids)[:, 90:])
    last = small.step(input_ids, small.new_state(len(input_ids)), only_last=True)
    assert_same_logits(last, small(input_ids)[:, -1:])
    with pytest.raises(ValueError, match="96 \\+ 1 tokens"):
        small.step(input_ids[:, :1], state)


@torch.no_grad()
def test_a_state_serves_inside_and_outside_autocast(small):
    """Wherever it was made; under autocast it takes half the memory."""
    input_ids = tokens(SMALL, 40)
    expected = small(input_ids)
    for made_inside in (False, True):
        for used_inside in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=made_inside):
                state = small.new_state(1)
            assert state.layers[0].keys.dtype == (torch.bfloat16 if made_inside else torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=used_inside):
                found = steps(small, input_ids, state, [13])
            error = (found.float() - expected).abs().mean() / expected.std()
            assert error < (0.05 if made_inside or used_inside else 1e-5)


@torch.no_grad()
def test_weights_in_bfloat16_decode_as_in_the_full_pass(small):
    model, input_ids = small.bfloat16(), tokens(SMALL, 40)
    state = model.new_state(1)
    found, expected = steps(model, input_ids, state, [13]), model(input_ids)
    assert found.dtype == state.layers[0].keys.dtype == torch.bfloat16
    assert (found - expected).float().abs().mean() < 0.05 * expected.float().std()


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [11, 0, 3, 29, 0]])
def test_sequences_that_are_left_out_take_nothing_with_them(small, padding):
    """Before the window is full and after, in another order than they had, the padded ones gone or not."""
    input_ids = tokens(SMALL, 60, batch=5)
    padding = None if padding is None else torch.tensor(padding)
    expected = steps(small, input_ids, small.new_state(5, padding), [30])
    for rows in ([3, 0], [4, 1]):
        state = small.new_state(5, padding)
        steps(small, input_ids[:, :33], state, [30])
        state.keep(torch.tensor(rows))
        assert_same_logits(steps(small, input_ids[rows, 33:], state, [9]), expected[rows, 33:])
        assert {len(cache.keys) for cache in state.layers} == {2}


@torch.no_grad()
def test_a_state_for_few_tokens_is_small_and_takes_them(small):
    input_ids = tokens(SMALL, 20)
    state = small.new_state(1, length=20)
    assert [cache.capacity for cache in state.layers] == [8, 8, 20, 8]
    assert_same_logits(steps(small, input_ids, state, [5]), small(input_ids))


# The filters


def kept_by_definition(logits, sampling):
    """Token ids that may be drawn and their probabilities, for one row of logits (a list), step by step."""
    scores = {token: value / sampling.temperature for token, value in enumerate(logits)}

    def probabilities():
        highest = max(scores.values())
        total = sum(math.exp(value - highest) for value in scores.values())
        return {token: math.exp(value - highest) / total for token, value in scores.items()}

    likeliest_first = sorted(scores, key=scores.get, reverse=True)
    if sampling.top_k is not None:
        scores = {token: scores[token] for token in likeliest_first[: sampling.top_k]}
    if sampling.top_p is not None:
        share, total, kept = probabilities(), 0.0, []
        for token in likeliest_first:
            if token in scores and total < sampling.top_p:
                kept.append(token)
                total += share[token]
        scores = {token: scores[token] for token in kept}
    if sampling.min_p is not None:
        share = probabilities()
        scores = {token: scores[token] for token in scores if share[token] >= sampling.min_p * max(share.values())}
    return probabilities()


FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    *(Sampling(temperature=1.0, top_k=k) for k in (1, 5, 61, 1000)),
    *(Sampling(temperature=1.0, top_p=p) for p in (1e-300, 0.01, 0.5, 0.9, 0.999, 1.0)),
    *(Sampling(temperature=1.0, min_p=p) for p in (0.0, 0.05, 0.5, 1.0)),
    Sampling(temperature=0.7, top_k=20, top_p=0.8),
    Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_filters_keep_what_their_definitions_keep(sampling):
    logits = 3 * torch.randn(20, 61, generator=torch.Generator().manual_seed(0))
    filtered = filter_logits(logits, sampling)
    for row, values in zip(filtered, logits.double().tolist(), strict=True):
        expected = kept_by_definition(values, sampling)
        assert set(row.isfinite().nonzero()[:, 0].tolist()) == set(expected)
        found = row.softmax(dim=-1)
        for token, share in expected.items():
            assert float(found[token]) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize(
    "sampling", [*FILTERS, GREEDY, Sampling(temperature=0.9, top_k=9, top_p=0.9, repetition_penalty=1.4)], ids=str
)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(sampling):
    """Of what the filters keep, in the order of the vocabulary, token by token; the same whatever stands in a batch."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(40, 61, generator=generator)
    seen = torch.rand(40, 61, generator=generator) < 0.3
    numbers = torch.rand(40, generator=generator, dtype=torch.float64)
    numbers[0], numbers[1] = 0.0, 1 - 2**-30
    found = draw(logits, sampling, numbers, seen)
    filtered = filter_logits(logits, sampling, seen)
    for row, number in enumerate(numbers.tolist()):
        shares, reached, token = filtered[row].softmax(dim=-1).double().tolist(), 0.0, -1
        while reached <= number * sum(shares):
            token += 1
            reached += shares[token]
        assert int(found[row]) == (token if sampling.temperature else int(filtered[row].argmax()))
        assert torch.equal(draw(logits[row, None], sampling, numbers[row, None], seen[row, None]), found[row, None])


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_repetition_penalty_makes_seen_tokens_less_likely(penalty, temperature):
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [0.5, 0.0, -3.0, 4.0]])
    seen = torch.tensor([[True, True, False, False], [False, True, True, False]])
    found = filter_logits(logits, Sampling(temperature=temperature, repetition_penalty=penalty), seen)
    expected = torch.tensor([[2.0 / penalty, -2.0 * penalty, 1.0, -1.0], [0.5, 0.0, -3.0 * penalty, 4.0]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "sampling",
    [*FILTERS, Sampling(temperature=0.9, top_k=25, top_p=0.85, min_p=0.02, repetition_penalty=1.4)],
    ids=str,
)
def test_filters_equal_those_of_transformers(sampling):
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(20, 61, generator=generator)
    input_ids = torch.randint(61, (20, 15), generator=generator)
    warpers = [process.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    warpers.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        warpers.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(process.MinPLogitsWarper(sampling.min_p))
    expected = logits.clone()
    for warper in warpers:
        expected = warper(input_ids, expected)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, input_ids, True)
    torch.testing.assert_close(filter_logits(logits, sampling, seen), expected)


def test_impossible_sampling_is_named():
    wrong = Sampling(temperature=-1, top_k=0, top_p=0.0, min_p=1.5, repetition_penalty=0)
    assert [name for name, *_ in wrong.problems()] == ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    assert Sampling(temperature=0, top_k=1, top_p=1.0, min_p=0.0).problems() == []


# Generation


def greedy_by_full_passes(model, prompt, count, penalty=1.0):
    """The likeliest continuation, by the full forward pass alone."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids]))[0, -1]
            for token in set(ids):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_takes_the_likeliest_past_the_window_to_the_context_end(small):
    prompt = tokens(SMALL, 5)[0].tolist()
    (found,) = generate(small, [prompt], 1000, sampling=GREEDY)
    assert found == greedy_by_full_passes(small, prompt, 91)
    assert len(set(found)) > 3, "a constant text would prove little"
    assert generate(small, [prompt], 7, sampling=GREEDY) == [found[:7]]


def test_generation_runs_the_model_no_oftener_than_it_must(small):
    calls = []
    step = small.step
    small.step = lambda input_ids, state, **how: calls.append(input_ids.shape[1]) or step(input_ids, state, **how)
    generate(small, [tokens(SMALL, 6)[0].tolist()], 4, sampling=GREEDY)
    assert calls == [6, 1, 1, 1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=20, repetition_penalty=1.2, seed=5)])
def test_a_rows_text_does_not_depend_on_the_rest_of_the_batch(small, sampling):
    prompts = [tokens(SMALL, length, seed=length)[0].tolist() for length in (4, 21, 1, 9)]
    together = generate(small, prompts, 30, sampling=sampling)
    for row, prompt in enumerate(prompts):
        others = [[3]] * row
        alone = generate(small, [*others, prompt], 30, sampling=sampling)
        assert alone[row] == together[row]
    if sampling.temperature:
        from_its_own_seed = Sampling(**{**vars(sampling), "seed": sampling.seed + 2})
        assert generate(small, prompts[2:3], 30, sampling=from_its_own_seed) == together[2:3]


@pytest.mark.parametrize("options", [{}, {"window": None}, {"positions": "learned"}])
def test_each_row_goes_on_to_its_own_end_of_the_context(awake, options):
    """Beside a prompt that all but fills the context, a short one gets as long a text as alone."""
    model = awake(ModelConfig(**{**vars(SMALL), **options}))
    prompts = [tokens(SMALL, length, seed=length)[0].tolist() for length in (5, 93, 40, 95)]
    together = generate(model, prompts, 1000, sampling=GREEDY)
    assert [len(text) for text in together] == [91, 3, 56, 1]
    for prompt, text in zip(prompts, together, strict=True):
        assert text == greedy_by_full_passes(model, prompt, len(text))
    assert generate(model, prompts, 50, sampling=GREEDY) == [text[:50] for text in together]


def test_a_seed_gives_one_text_and_another_seed_another(small):
    torch.manual_seed(0)
    expected_draw = torch.rand(3)
    torch.manual_seed(0)
    texts = [generate(small, [[1, 2, 3]], 25, sampling=Sampling(seed=seed))[0] for seed in (7, 8, 7)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.equal(torch.rand(3), expected_draw), "generation drew from the global generator"


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=20, top_p=0.8),
     Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.2)], ids=str,
)  # fmt: skip
def test_a_key_has_one_text_whatever_batch_it_is_in(awake, monkeypatch, sampling):
    """In float64, where rounding cannot turn a draw: alone, by 7, all 64 together, and in another order; prompts of
    several lengths, ends that come early and late, sequences dropped on the way, ends looked for now and then."""
    model = awake(SMALL).double()
    keys = [(tokens(SMALL, 1 + 5 * n % 23, seed=n)[0].tolist(), (2**61 - 1) * n % 2**63) for n in range(64)]

    def texts(keys, size, new=30):
        found = []
        for first in range(0, len(keys), size):
            prompts, seeds = zip(*keys[first : first + size], strict=True)
            found += generate(model, prompts, new, (7, 11, 13), sampling, seeds=seeds)
        return found

    expected = texts(keys, 64)
    assert len({len(text) for text in expected}) > 10 and max(map(len, expected)) == 30
    assert texts(keys, 7) == expected
    assert texts(keys[:16], 1) == expected[:16]
    order = random.Random(0).sample(range(64), 64)
    monkeypatch.setitem(decoding.READ_EVERY, "cpu", 5)
    assert texts([keys[place] for place in order], 64) == [expected[place] for place in order]
    monkeypatch.setattr(decoding, "STILL_RUNNING", 0)
    assert texts(keys, 64, 11) == [text[:11] for text in expected]


def test_seeds_are_whole_and_one_a_prompt(small):
    """They differ where only their upper halves do, and the default ones are consecutive."""
    sampling = Sampling(temperature=1.0, seed=-3)
    upper = generate(small, [[1, 2]] * 3, 25, sampling=sampling, seeds=[5, 5 + 2**32, 5 + 2**62])
    assert len({tuple(text) for text in upper}) == 3
    named = generate(small, [[1, 2]] * 3, 25, sampling=sampling, seeds=[-3, -2, -1])
    assert generate(small, [[1, 2]] * 3, 25, sampling=sampling) == named
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        generate(small, [[1]] * 3, 5, seeds=[1, 2])


@pytest.mark.parametrize("every", [1, 7])
def test_sequences_that_have_ended_leave_the_batch(small, monkeypatch, every):
    """Once a quarter of it has; those at their context's end too, and nobody is asked beyond the last one's end."""
    monkeypatch.setitem(decoding.READ_EVERY, "cpu", every)
    prompts = [tokens(SMALL, length, seed=length)[0].tolist() for length in (90, 92, 5, 70, 93, 94, 3, 88)]
    expected = [greedy_by_full_passes(small, prompt, 96 - len(prompt)) for prompt in prompts]
    stop = expected[6][40]
    expected = [text[: text.index(stop)] if stop in text else text for text in expected]
    sizes = []
    step = small.step
    small.step = lambda input_ids, state, **how: sizes.append(len(input_ids)) or step(input_ids, state, **how)
    assert generate(small, prompts, 1000, [stop], GREEDY) == expected
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 8 and sizes[-1] <= 2
    longest = max(map(len, expected))
    assert len(sizes) <= longest + every


def test_drawn_tokens_have_the_models_probabilities(small):
    """4,000 rows of one prompt, each with its own generator seeded one further: a chi-square test at 1 in 10,000."""
    prompt, sampling = [5, 17, 3], Sampling(temperature=1.0, top_k=8)
    texts = generate(small, [prompt] * 4000, 1, sampling=sampling)
    with torch.no_grad():
        logits = small(torch.tensor([prompt]))[:, -1]
    shares = filter_logits(logits, sampling).softmax(dim=-1)[0].double()
    counts = torch.bincount(torch.tensor(texts)[:, 0], minlength=61).double()
    possible = shares > 0
    assert counts[~possible].sum() == 0
    assert ((counts - 4000 * shares) ** 2 / (4000 * shares))[possible].sum() < 29.9  # 7 degrees of freedom


def test_generation_stops_at_a_stop_token_row_by_row(small):
    prompts = [tokens(SMALL, length, seed=length)[0].tolist() for length in (4, 21, 9)]
    free = generate(small, prompts, 40, sampling=GREEDY)
    stops = [free[0][10], free[2][3]]
    expected = []
    for text in free:
        places = [place for place, token in enumerate(text) if token in stops]
        expected.append(text[: places[0]] if places else text)
    heard = []
    found = generate(small, prompts, 40, stops, GREEDY, on_token=lambda row, token: heard.append((row, token)))
    assert found == expected
    assert min(map(len, expected)) < max(map(len, expected))
    assert [[token for row, token in heard if row == wanted] for wanted in range(3)] == expected


def test_generation_ends_early_when_every_row_has_stopped(small):
    free = generate(small, [[1], [2]], 20, sampling=GREEDY)
    lengths = []
    step = small.step
    small.step = lambda input_ids, state, **how: lengths.append(state.length) or step(input_ids, state, **how)
    assert generate(small, [[1], [2]], 20, {free[0][0], free[1][0]}, GREEDY) == [[], []]
    assert lengths == [0]


def test_the_repetition_penalty_counts_prompt_and_text_but_not_padding(small):
    prompts = [[4, 9], [1, 2, 3, 5, 6, 7, 8, 8, 8]]
    (first,) = greedy_by_full_passes(small, prompts[0], 1)
    with torch.no_grad():  # rename the first prompt's next token to 0, which the padding holds
        small.embedding.weight[[0, first]] = small.embedding.weight[[first, 0]]
    expected = [greedy_by_full_passes(small, prompt, 30, penalty=1.7) for prompt in prompts]
    assert generate(small, prompts, 30, sampling=Sampling(temperature=0.0, repetition_penalty=1.7)) == expected
    assert generate(small, prompts, 30, sampling=GREEDY) != expected
    assert expected[0][0] == 0, "a penalty on the padding would not show"


@pytest.mark.parametrize(("prompts", "message"), [([[1], []], "prompt is empty"), ([[1], [0] * 96], "96 tokens fills")])
def test_prompts_that_cannot_be_continued_are_refused(small, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(small, prompts, 5)


def test_generation_gives_the_model_back_as_it_was(small):
    for training in (True, False):
        small.train(training)
        generate(small, [[1, 2]], 3)
        assert small.training is training
    small.train()
    small.hidden_states(tokens(SMALL)).sum().backward()  # nothing of inference mode is left in the weights


@pytest.mark.campaign
@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: for_decoding(model, "fp32")])
def test_compiled_steps_write_the_same(awake, prepare):
    """Past the window and the ring's first round. Compiling takes a minute or two on a CPU."""
    prompt = tokens(SMALL, 20)[0].tolist()
    expected = generate(awake(SMALL), [prompt], 60, sampling=Sampling(temperature=0))
    model = prepare(awake(SMALL))
    compile_steps(model)
    assert generate(model, [prompt], 60, sampling=Sampling(temperature=0)) == expected


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=2.0), Sampling(temperature=2.0, top_k=40),
                                      Sampling(temperature=2.0, top_p=0.9, repetition_penalty=1.3)])  # fmt: skip
def test_what_is_never_drawn_has_no_probability_and_the_others_have_theirs(small, sampling):
    """As if the model gave it no logit at all, from the first token on; ids that the tokenizer lacks do not matter."""
    never = [0, 3, 17, 40, 60]
    found = generate(small, [[1, 2], [5]], 60, sampling=sampling, entries=58, never=never)
    assert not {token for row in found for token in row} & {*never, 58, 59}
    step = small.step

    def masked(*given, **how):
        logits = step(*given, **how)
        logits[..., never] = float("-inf")
        return logits

    small.step = masked
    assert generate(small, [[1, 2], [5]], 60, sampling=sampling, entries=58) == found
