"""Attention against its definition: values, gradients, masks, and that a windowed layer never makes a T x T tensor."""

import math
from types import SimpleNamespace

import pytest
import torch

import models.kernels.attention
from models.kernels.attention import (
    BLOCK,
    Documents,
    Kernel,
    Layout,
    attend_to_cache,
    attention,
    choose_kernel,
    kernel_for,
    reference,
)

LENGTH = 37
DOCUMENTS = {
    "one document": None,
    "packed": [[0] * 5 + [1] * 1 + [2] * 20 + [3] * 11, [4] * 37],
    "every token a document": [list(range(37)), [7] * 18 + [8] * 19],
}


def draw(heads, kv_heads, length=LENGTH, width=16, batch=2, dtype=torch.float32, seed=0):
    """query [B, H, T, D], key and value [B, K, T, D], with large enough scores that the softmax is peaked."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, width), (batch, kv_heads, length, width), (batch, kv_heads, length, width)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[0].mul_(2)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def attend(query, key, value, window, document_ids):
    """`attention` with the mask that a layer of this window gets in the model."""
    length = query.shape[2]
    layout = Layout.of(document_ids, length, query.device)
    mask = layout.mask(window)
    return attention(query, key, value, window, mask)


def relative_error(found, expected, scale=None):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or scale)


def assert_all_close(inputs, window, document_ids, tolerance):
    """Output and all three gradients of `attend` against the float64 reference."""
    copies = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = attend(*inputs, window, document_ids), reference(*copies, window, document_ids)
    assert found.dtype == inputs[0].dtype
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found_gradients = torch.autograd.grad(found, inputs, weights.to(found.dtype))
    expected_gradients = torch.autograd.grad(expected, copies, weights)
    errors = {"output": relative_error(found, expected)}
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for name, one, other in zip(("query", "key", "value"), found_gradients, expected_gradients, strict=True):
        errors[name] = relative_error(one, other, largest)  # with one key a query, the scores' gradients are zero
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1), (9, 3)])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 36, 37, 100, None])
def test_values_and_gradients_equal_the_reference(window, heads, kv_heads, documents):
    ids = DOCUMENTS[documents]
    document_ids = None if ids is None else torch.tensor(ids)
    assert_all_close(draw(heads, kv_heads), window, document_ids, 1e-5)


@pytest.mark.parametrize("window", [7, 37, None])
def test_in_float64_only_rounding_is_left(window):
    document_ids = torch.tensor(DOCUMENTS["packed"])
    assert_all_close(draw(4, 2, dtype=torch.float64), window, document_ids, 1e-13)


@pytest.mark.parametrize("at_once", [1, 21, 28, 10**6])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_few_chunks_at_a_time_are_what_sdpa_makes_of_all_of_them(monkeypatch, documents, at_once):
    """The CPU's way and the one of MPS and of GPUs without flex attention, whose chunks are 7 of 37 tokens."""
    ids = DOCUMENTS[documents]
    document_ids = None if ids is None else torch.tensor(ids)
    inputs, other = draw(4, 2), draw(4, 2)
    monkeypatch.setattr(models.kernels.attention, "AT_ONCE", at_once)
    found = attend(*inputs, 7, document_ids)
    monkeypatch.setattr(models.kernels.attention, "_solve_on_cpu", models.kernels.attention._solve)
    expected = attend(*other, 7, document_ids)
    assert relative_error(found, expected) < 1e-6
    gradients = torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), other)
    for one, same in zip(*gradients, strict=True):
        assert relative_error(one, same) < 1e-6


@pytest.mark.parametrize(
    ("length", "window", "heads", "kv_heads", "width"), [(256, 64, 8, 2, 32), (512, 128, 16, 8, 128)]
)
def test_recipes_head_shapes_equal_the_reference(length, window, heads, kv_heads, width):
    """The head shapes of helium-13m and flow-1b, over several windows and a remainder."""
    length += 13
    document_ids = (torch.arange(length) // 150)[None]
    assert_all_close(draw(heads, kv_heads, length, width, batch=1), window, document_ids, 1e-5)


def test_bfloat16_stays_close():
    assert_all_close(draw(4, 2, dtype=torch.bfloat16), 7, torch.tensor(DOCUMENTS["packed"]), 0.03)


def test_the_reference_is_the_definition_written_out():
    query, key, value = (tensor.detach() for tensor in draw(4, 2, length=7, width=2, batch=1, dtype=torch.float64))
    documents, window = [0, 0, 0, 1, 1, 1, 1], 3
    found = reference(query, key, value, window, torch.tensor([documents]))
    for head in range(4):
        group = head // 2
        for i in range(7):
            seen = [j for j in range(max(0, i - window + 1), i + 1) if documents[i] == documents[j]]
            scores = [math.exp(float(query[0, head, i] @ key[0, group, j]) / math.sqrt(2)) for j in seen]
            mean = sum(score * value[0, group, j] for score, j in zip(scores, seen, strict=True)) / sum(scores)
            torch.testing.assert_close(found[0, head, i], mean)


def test_layout_finds_documents_and_restarts_positions():
    ids = torch.tensor([[5, 5, 5, 2, 9, 9], [1, 1, 3, 3, 1, 1]])  # an id that comes back is another document
    layout = Layout.of(ids, 6, ids.device)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 0, 1]]
    assert layout.segments.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 2]]
    assert layout.mask(None).segments is layout.segments
    whole = Layout.of(None, 6, ids.device)
    assert whole.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert whole.segments is None and whole.mask(None) is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_windowed_layer_makes_no_dense_tensor(recorder, packed):
    """Largest tensor, forward and backward: no T x T anywhere, and linear in T for a fixed window."""
    heads, kv_heads, width, window = 4, 2, 16, 32

    def largest(length):
        inputs = draw(heads, kv_heads, length, width, batch=1)
        document_ids = (torch.arange(length) // 300)[None] if packed else None
        recorder.elements.clear()
        with recorder:
            attend(*inputs, window, document_ids).sum().backward()
        return recorder.largest

    small, large = largest(1024), largest(4096)
    assert large <= 4096 * max(heads * width, 2 * kv_heads * width, 2 * window)
    assert large <= 4.01 * small
    assert large < 4096 * 4096 / 8
    with recorder:
        reference(*draw(heads, kv_heads, 256, width, batch=1), window, None)
    assert recorder.largest >= heads * 256 * 256, "the recorder would not have seen a dense tensor"


def test_a_windowed_layer_costs_operations_linear_in_length(flop_counter):
    heads, width, window = 4, 16, 32

    def operations(length):
        with flop_counter:
            attend(*draw(heads, 2, length, width, batch=1), window, None).sum().backward()
        return flop_counter.get_total_flops()

    each_key = 3 * 4 * heads * width  # scores and values, forward and twice that backward, a multiply and an add each
    assert operations(512) == 512 * 2 * window * each_key
    assert operations(2048) == 2048 * 2 * window * each_key


# Which kernel


def test_no_length_but_the_trained_ones_waits_for_a_compiler(monkeypatch):
    """Of 50 documents of 50 lengths, on an H100, each compiled flex attention anew, until torch gave up compiling."""
    monkeypatch.setattr("models.kernels.attention.choose_kernel", lambda *_: Kernel("flex", "for a test"))
    about = torch.device("cpu"), 32, torch.float32
    assert kernel_for(*about, 1598) == kernel_for(*about, 256) == "flex"
    with torch.no_grad():
        assert kernel_for(*about, 1598) == "banded" and kernel_for(*about, 256) == "flex"
    with torch.inference_mode():
        assert kernel_for(*about, 1598) == "banded"


# The CUDA kernel's masks, on the CPU


def dense(mask, rows, length):
    """[B, T, T] bool: what a kernel sees that visits the listed blocks and looks inside the partial ones."""
    allowed = torch.zeros(rows, length, length, dtype=torch.bool)
    places = torch.arange(length)
    for row in range(rows):
        source = min(row, mask.kv_num_blocks.shape[0] - 1)
        inside = mask.mask_mod(torch.tensor(row), torch.tensor(0), places[:, None], places[None, :])
        for counts, indices, whole in (
            (mask.kv_num_blocks, mask.kv_indices, False), (mask.full_kv_num_blocks, mask.full_kv_indices, True)
        ):  # fmt: skip
            for block in range(counts.shape[-1]):
                for other in indices[source, 0, block, : counts[source, 0, block]].tolist():
                    queries, keys = slice(block * BLOCK, (block + 1) * BLOCK), slice(other * BLOCK, (other + 1) * BLOCK)
                    assert not allowed[row, queries, keys].any(), "a block is listed twice"
                    allowed[row, queries, keys] = True if whole else inside[queries, keys]
                    assert allowed[row, queries, keys].any(), "a block is visited for nothing"
    return allowed


def flex_documents(length):
    """Boundaries at and off the blocks' edges, documents within a block and across several, one row whole."""
    cuts = torch.zeros(3, length, dtype=torch.int64)
    for row, starts in enumerate(([1, 5, 127, 128, 129, 300, 301], [128, 256, 384], [])):
        for start in starts:
            cuts[row, start:] += 1
    return cuts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [60, 128, 300, 513])
@pytest.mark.parametrize("window", [1, 64, 128, 130, 257, 1000, None])
def test_flex_attention_visits_just_the_blocks_that_it_must(length, window, packed):
    document_ids = flex_documents(length) if packed else None
    mask = Layout.of(document_ids, length, torch.device("cpu"), "flex").mask(window)
    if mask is None:
        assert not packed and (window or length) >= length
        return
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    expected = ((j <= i) & (j > i - (window or length)))[None].expand(3, -1, -1)
    if packed:
        expected = expected & (document_ids[:, :, None] == document_ids[:, None, :])
    assert torch.equal(dense(mask, 3, length), expected)


@pytest.mark.parametrize(("window", "length"), [(64, 300), (128, 257), (None, 300)])
def test_flex_attention_equals_the_reference(window, length):
    document_ids = flex_documents(length)
    query, key, value = (x.detach() for x in draw(6, 2, length, batch=3))
    mask = Layout.of(document_ids, length, torch.device("cpu"), "flex").mask(window)
    found = attention(query, key, value, window, mask)
    assert relative_error(found, reference(query, key, value, window, document_ids)) < 1e-5


def test_flex_masks_are_made_without_a_dense_tensor(recorder):
    document_ids = (torch.arange(8192) // 300)[None]
    with recorder:
        Layout.of(document_ids, 8192, torch.device("cpu"), "flex").mask(128)
    assert recorder.largest <= 4 * 8192


@pytest.mark.parametrize(
    ("capability", "shared", "width", "dtype", "compiler", "name", "reason"),
    [
        ((9, 0), 232_448, 64, torch.bfloat16, True, "flex", "capability 9.0"),
        ((12, 0), 101_376, 128, torch.bfloat16, True, "flex", "capability 12.0"),
        ((8, 0), 166_912, 16, torch.float32, True, "flex", "capability 8.0"),
        ((7, 5), 65_536, 64, torch.bfloat16, True, "banded", "has 7.5"),
        ((8, 9), 101_376, 8, torch.bfloat16, True, "banded", "heads of width 16, these have 8"),
        ((8, 9), 101_376, 64, torch.float32, True, "flex", "capability 8.9"),
        ((8, 9), 101_376, 128, torch.float32, True, "banded", "fp32 needs 131,072 bytes of shared memory"),
        ((9, 0), 232_448, 64, torch.bfloat16, False, "banded", "a C compiler"),
    ],
)
def test_the_kernel_is_chosen_by_what_the_gpu_can_with_a_reason(
    monkeypatch, capability, shared, width, dtype, compiler, name, reason
):
    assert choose_kernel(torch.device("cpu"), width, dtype).name == "banded"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    about = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: about)
    monkeypatch.setattr(models.kernels.attention, "find_spec", lambda _name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(models.kernels.attention.shutil, "which", lambda _name: "/usr/bin/cc" if compiler else None)
    choose_kernel.cache_clear()
    chosen = choose_kernel(torch.device("cuda"), width, dtype)
    choose_kernel.cache_clear()
    assert chosen.name == name and reason in chosen.reason


# What packed rows get from layers that see everything where there is neither a CPU nor flex attention


@pytest.mark.parametrize("documents", ["packed", "every token a document"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("part", [1, 7, 37, 100])
def test_masks_in_parts_equal_the_reference(monkeypatch, documents, heads, kv_heads, part):
    monkeypatch.setattr(models.kernels.attention, "PART", part)
    monkeypatch.setattr(models.kernels.attention, "_apart", models.kernels.attention._in_parts)
    assert_all_close(draw(heads, kv_heads), None, torch.tensor(DOCUMENTS[documents]), 1e-5)


@pytest.mark.parametrize("backward", ["", "_backward"])
def test_on_a_cpu_no_query_meets_a_key_of_another_document(monkeypatch, backward):
    """Seen by what torch is asked for: tokens, of one document after the other."""
    name = f"_scaled_dot_product_flash_attention_for_cpu{backward}"
    plain, asked = getattr(torch.ops.aten, name), []

    def noting(*arguments):
        query, key, _ = arguments[1:4] if backward else arguments[:3]
        asked.append((query.shape[2], key.shape[2]))
        return plain(*arguments)

    monkeypatch.setattr(torch.ops.aten, name, noting)
    documents = torch.tensor(DOCUMENTS["packed"])
    layout = Layout.of(documents, LENGTH, torch.device("cpu"))
    attention(*draw(4, 2), None, layout.mask(None)).sum().backward()
    assert asked == [(length, length) for length in (5, 1, 20, 11, 37)]


def test_masks_in_parts_are_never_as_large_as_the_whole_nor_kept(monkeypatch, recorder):
    """Forward and backward: what such a layer gets on any device but a CPU."""
    monkeypatch.setattr(models.kernels.attention, "_apart", models.kernels.attention._in_parts)
    length, heads = 2048, 2
    layout = Layout.of((torch.arange(length) // 300)[None], length, torch.device("cpu"))
    inputs = draw(heads, 1, length, width=8, batch=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x), recorder:
        out = attention(*inputs, None, Documents(layout.segments))
    with recorder:
        out.sum().backward()
    assert recorder.largest <= heads * models.kernels.attention.PART * length < length * length
    assert max(kept) <= length * 8 * heads


@pytest.mark.parametrize("new", [1, 5])
def test_cached_attention_equals_the_last_rows_of_the_reference(new):
    query, key, value = (tensor.detach() for tensor in draw(4, 2))
    expected = reference(query, key, value, None, None)[:, :, -new:]
    visible = torch.ones(new, LENGTH, dtype=torch.bool).tril(LENGTH - new)[None, None] if new > 1 else None
    found = attend_to_cache(query[:, :, -new:], key, value, visible)
    assert relative_error(found, expected) < 1e-5
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
    shuffled = None if visible is None else visible[..., order]
    again = attend_to_cache(query[:, :, -new:], key[:, :, order], value[:, :, order], shuffled)
    assert relative_error(again, expected) < 1e-5
