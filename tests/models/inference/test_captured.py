"""Recorded steps: the fixed step that a graph records gives what the plain one gives, and what differs is not used.

There is no GPU here: the recording is the recorded function itself, so that everything but the card's own part runs.
"""

import pytest
import torch

from models import ModelConfig, transformer
from models.compilation import compile_recorded_steps
from models.inference import captured
from models.inference.captured import CapturedSteps
from models.inference.decoding import generate, prefill
from models.inference.sampling import Sampling

SMALL = ModelConfig(vocab_size=61, context=120, n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=24,
                    global_every=3)  # fmt: skip


@pytest.fixture
def recordings(monkeypatch):
    """The spans for which a step was recorded, by plain functions and with spans of 32."""
    made = []

    def record(step):
        step()
        made.append(step.__self__._span)
        return step

    monkeypatch.setattr(captured, "as_cuda_graph", record)
    monkeypatch.setattr(captured, "available", lambda _device: True)
    monkeypatch.setattr(captured, "SPAN", 32)
    return made


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [9, 0, 17]])
@pytest.mark.parametrize("options", [{}, {"window": None}, {"positions": "learned"}])
def test_the_fixed_step_gives_what_the_plain_step_gives(awake, recordings, monkeypatch, padding, options):
    """Past the window, past spans, to the context's end; in float64, to rounding."""
    monkeypatch.setattr(transformer, "FIRST_ROWS", 32)
    model = awake(ModelConfig(**{**vars(SMALL), **options})).double()
    ids = torch.randint(61, (3, 120), generator=torch.Generator().manual_seed(0))
    plain, fixed = (model.new_state(3, None if padding is None else torch.tensor(padding)) for _ in range(2))
    for state in (plain, fixed):
        prefill(model, ids[:, :20], state)
    steps = CapturedSteps(model, fixed)
    kept = {}  # by span: a graph works on the very tensors that it was recorded with
    for place in range(20, 120):
        expected, found = model.step(ids[:, place, None], plain), steps(ids[:, place, None])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        tensors = [*model.buffers(), *(tensor for cache in fixed.layers for tensor in (cache.keys, cache.values))]
        kept.setdefault(steps._span, set()).add(tuple(tensor.data_ptr() for tensor in tensors))
    assert all(len(places) == 1 for places in kept.values()) and len(set.union(*kept.values())) > 1
    assert steps.failed is None and recordings == [32, 64, 96, 128] and plain.length == fixed.length
    if padding is None:
        with pytest.raises(ValueError, match="context of 120"):
            steps(ids[:, :1])


def test_texts_are_the_same_with_and_without(awake, recordings):
    """Sequences that end at different times leave the batch, and the recording is made anew."""
    model = awake(SMALL).double()
    prompts = [[1 + row] * (1 + 3 * row) for row in range(9)]
    how = dict(stop_ids=[7, 9], sampling=Sampling(temperature=1.0, top_k=20, repetition_penalty=1.1))
    expected = generate(model, prompts, 90, **how)
    assert generate(model, prompts, 90, graphs=True, **how) == expected
    assert len(set(map(len, expected))) > 4 and len(recordings) > 4


@pytest.mark.parametrize("fault", ["error", "values"])
def test_a_recording_that_fails_is_told_once_and_not_used(awake, recordings, monkeypatch, fault):
    model = awake(SMALL)

    def record(step):
        if fault == "error":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: step() * 1.01

    monkeypatch.setattr(captured, "as_cuda_graph", record)
    greedy = dict(sampling=Sampling(temperature=0.0))
    expected = generate(model, [[1, 2, 3], [4]], 100, **greedy)
    with pytest.warns(UserWarning, match="without CUDA graphs.*(not permitted when|off by 1.0%)") as told:
        assert generate(model, [[1, 2, 3], [4]], 100, graphs=True, **greedy) == expected
    assert len(told) == 1


def test_recorded_steps_may_be_compiled_and_no_others(awake, recordings):
    """Without the code that a compiler makes: what torch.compile traces is what the plain step computes."""
    model, compiled = awake(SMALL).double(), awake(SMALL).double()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_recorded_steps(compiled, backend=backend)
    how = dict(stop_ids=[7], sampling=Sampling(temperature=1.0, top_k=20))
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = generate(model, prompts, 50, **how)
    assert generate(compiled, prompts, 50, **how) == expected and not graphs
    assert generate(compiled, prompts, 50, graphs=True, **how) == expected and graphs


def test_without_a_gpu_graphs_are_nothing_to_ask_for(awake):
    model = awake(SMALL)
    assert generate(model, [[1, 2]], 9, graphs=True) == generate(model, [[1, 2]], 9)
