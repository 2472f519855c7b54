"""The transformer as a whole: causality, windows, packing, rotary positions, checkpointing, initialisation.

Window pattern, heads and context are the recipes' own; widths are small.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from data.loader import Batch, PackedRows
from data.token_shards import TokenShards
from models import ModelConfig, build_model
from models.kernels.attention import Layout
from models.kernels.fused import rotate
from models.kernels.ignored import IGNORE
from models.transformer import RotaryTable
from training.objectives import NextToken

SMALL = ModelConfig(vocab_size=61, context=96, n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=8,
                    global_every=3)  # fmt: skip


def tokens(config, length=None, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.context), generator=generator)


def changed(input_ids, position):
    """A copy in which the token at `position` is another one."""
    other = input_ids.clone()
    other[:, position] = (other[:, position] + 1) % 7
    return other


# Causality and windows


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_no_logit_depends_on_a_later_token(recipe, awake_recipe, packed):
    input_ids, context = tokens(recipe), recipe.context
    document_ids = (torch.arange(context) // (context // 3))[None] if packed else None
    before = awake_recipe(input_ids, document_ids)
    for position in (1, recipe.window or 100, context // 2 + 1, context - 1):
        after = awake_recipe(changed(input_ids, position), document_ids)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])
        if packed:
            end = int((document_ids == document_ids[:, position]).nonzero()[-1, 1]) + 1
            assert torch.equal(after[:, end:], before[:, end:])
            assert not torch.equal(after[:, end - 1], before[:, end - 1])


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 7, 64])
@pytest.mark.parametrize("position", [0, 33, 130])
def test_one_windowed_layer_reaches_exactly_its_window(awake, window, position):
    config = ModelConfig(vocab_size=61, context=200, n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48,
                         window=window, global_every=None)  # fmt: skip
    model, input_ids = awake(config), tokens(config)
    differs = (model(input_ids) != model(changed(input_ids, position))).any(dim=-1)[0]
    expected = [position <= place < position + window for place in range(200)]
    assert differs.tolist() == expected


@torch.no_grad()
def test_only_every_nth_layer_sees_everything(awake):
    """Two layers of window 4 reach 7 tokens; making the second one global lets the last token see the first."""
    shape = dict(vocab_size=61, context=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=4)
    for global_every, reach in ((None, 7), (2, 64)):
        model = awake(ModelConfig(**shape, global_every=global_every))
        input_ids = tokens(model.config)
        differs = (model(input_ids) != model(changed(input_ids, 0))).any(dim=-1)[0]
        assert differs.nonzero().max() == reach - 1


@torch.no_grad()
def test_a_window_as_long_as_the_sequence_restricts_nothing(awake):
    """One token less does."""
    config = ModelConfig(vocab_size=61, context=64, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48,
                         window=24, global_every=None)  # fmt: skip
    models = [awake(ModelConfig(**{**vars(config), "window": size, "rope_base_global": 1e4})) for size in (23, 24, 99)]
    narrow, exact, wide = (model(tokens(config, 24)) for model in models)
    torch.testing.assert_close(exact, wide)
    assert (narrow[:, -1] - exact[:, -1]).abs().max() > 1e-3


def test_no_tensor_of_a_windowed_model_is_dense(recorder):
    config = ModelConfig(vocab_size=61, context=2048, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48,
                         window=16, global_every=None)  # fmt: skip
    model, input_ids = build_model(config).train(), tokens(config)
    with recorder:
        model.hidden_states(input_ids, (torch.arange(2048) // 500)[None]).sum().backward()
    assert recorder.largest < 2048 * 2048 / 16


def test_more_tokens_than_the_context_are_refused():
    model = build_model(SMALL)
    with pytest.raises(ValueError, match="97 tokens .* context of 96"):
        model(tokens(SMALL, 97))


# Packing


@torch.no_grad()
def test_packed_documents_equal_the_same_documents_alone(recipe, awake_recipe):
    context, window = recipe.context, recipe.window or 64
    lengths = [1, window - 1, window, 1, window // 2 + 3]
    lengths.append(context - sum(lengths))
    rows = [tokens(recipe, seed=1), tokens(recipe, seed=2)]
    orders = [lengths, lengths[::-1]]
    document_ids = torch.stack([torch.repeat_interleave(torch.arange(6) + 3, torch.tensor(order)) for order in orders])
    packed = awake_recipe(torch.cat(rows), document_ids)
    for row, order in enumerate(orders):
        parts = rows[row].split(order, dim=1)
        alone = torch.cat([awake_recipe(part) for part in parts], dim=1)
        assert (packed[row] - alone[0]).abs().max() < 1e-5 * alone.abs().max()
    without = awake_recipe(torch.cat(rows))
    assert (without - packed).abs().max() > 0.1, "the boundaries made no difference"


def write_shards(folder, documents, end_of_text):
    """A shard folder as data.prepare writes it, of documents given as token ids."""
    folder.mkdir()
    flat = [token for document in documents for token in [*document, end_of_text]]
    np.array(flat, dtype="<u2").tofile(folder / "train-00000.tokens")
    np.array([len(document) + 1 for document in documents], dtype="<i8").tofile(folder / "train-00000.lengths")
    about = {"end_of_text": end_of_text, "dtype": "uint16", "splits": {"train": {"shards": ["train-00000"]}}}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


@torch.no_grad()
def test_a_loader_row_teaches_what_its_documents_alone_teach(tmp_path, awake):
    """Through shards, packing and the objective: every document's loss is what the document alone gives."""
    config = ModelConfig(**{**vars(SMALL), "context": 64})
    model, end = awake(config), 60
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 60, size).tolist() for size in (5, 63, 17, 40, 22, 1, 9, 31, 12, 46)]
    packed = PackedRows(TokenShards(write_shards(tmp_path / "shards", documents, end), "train"), 64)
    rows = [packed.row(index) for index in range(len(packed))]
    input_ids, labels, document_ids = (
        torch.stack([torch.from_numpy(getattr(row, name)) for row in rows])
        for name in ("input_ids", "labels", "document_ids")
    )
    assert any(int(ids.max()) > 1 for ids in document_ids), "no row holds two documents"

    cut = {int(piece) for piece in packed.plan.document[packed.plan.offset > 0]}
    whole = [number for number in range(len(documents)) if number not in cut]
    assert len(whole) >= 8
    expected = {}
    for number in whole:
        text = torch.tensor([[end, *documents[number], end]])
        expected[number] = F.cross_entropy(model(text[:, :-1])[0], text[0, 1:], reduction="none")

    found = F.cross_entropy(model(input_ids, document_ids).mT, labels, ignore_index=IGNORE, reduction="none")
    for row in range(len(packed)):
        position = 0
        for piece in range(packed.plan.row_starts[row], packed.plan.row_starts[row + 1]):
            length, number = int(packed.plan.length[piece]), int(packed.plan.document[piece])
            if number in expected:
                alone = expected.pop(number)
                torch.testing.assert_close(found[row, position : position + length], alone, rtol=1e-5, atol=1e-5)
            position += length
    assert not expected, "a document is in no row"

    batch = Batch(input_ids, labels, document_ids, torch.arange(len(packed)))
    loss, trained, _ = NextToken(model)(batch)
    assert int(trained) == sum(len(document) + 1 for document in documents)
    torch.testing.assert_close(loss, found.sum(), rtol=1e-5, atol=0)


# Rotary positions


def test_rotary_scores_depend_on_the_distance_alone():
    table = RotaryTable(2048, 16, 1e4)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = table(torch.arange(2048)[None])
    queries, keys = rotate(query.expand(1, 2048, 1, 16), cos, sin), rotate(key.expand(1, 2048, 1, 16), cos, sin)
    scores = {distance: (queries[0, distance:, 0] * keys[0, : 2048 - distance, 0]).sum(-1) for distance in (0, 5, 700)}
    for distance, score in scores.items():
        torch.testing.assert_close(score, score[:1].expand_as(score), rtol=0, atol=2e-5, msg=f"distance {distance}")
    torch.testing.assert_close(scores[0][0], (query * key).sum())
    assert (scores[5][0] - scores[0][0]).abs() > 0.1


def test_rotary_tables_are_exact_to_fp32_at_any_position():
    """In bfloat16 1,024 positions would have 513 distinct rows; in float32 angles the far ones would be off."""
    table = RotaryTable(32768, 64, 1e6)
    position = 32767
    frequencies = [1e6 ** (-2 * pair / 64) for pair in range(32)]
    exact = torch.tensor([math.cos(position * frequency) for frequency in frequencies])
    torch.testing.assert_close(table.cos[position, :32], exact, rtol=0, atol=1e-7)
    assert len(torch.cat([table.cos, table.sin], dim=1).unique(dim=0)) == 32768


@torch.no_grad()
def test_windowed_and_global_layers_turn_with_their_own_base(awake):
    def logits(**change):
        config = ModelConfig(**{**vars(SMALL), **change})
        return awake(config)(tokens(SMALL, 40))

    for base in ("rope_base", "rope_base_global"):
        assert (logits() - logits(**{base: 500.0})).abs().max() > 1e-2
    assert torch.equal(logits(global_every=None), logits(global_every=None, rope_base_global=500.0))
    assert torch.equal(logits(window=None), logits(window=None, rope_base=500.0))


# Against another implementation


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 8])
def test_logits_equal_an_independent_implementation(awake, window):
    """transformers' Llama, and Mistral for the sliding window, with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(**{**vars(SMALL), "window": window, "global_every": None, "rope_base_global": 1e4})
    model = awake(config)
    shape = dict(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.context, rms_norm_eps=config.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
    )  # fmt: skip
    if window is None:
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        other = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=window))
    names = [
        ("blocks", "model.layers"), ("embedding", "model.embed_tokens"), ("final_norm", "model.norm"),
        ("attention_norm", "input_layernorm"), ("feed_forward_norm", "post_attention_layernorm"),
        ("attention.query", "self_attn.q_proj"), ("attention.key", "self_attn.k_proj"),
        ("attention.value", "self_attn.v_proj"), ("attention.output", "self_attn.o_proj"),
        ("feed_forward.", "mlp."), ("gate.", "gate_proj."), ("up.", "up_proj."), ("down.", "down_proj."),
    ]  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        weights[name] = tensor
    weights["lm_head.weight"] = model.embedding.weight
    other.load_state_dict(weights)
    input_ids = tokens(config, 40, batch=2)
    expected = other.eval()(input_ids, use_cache=False).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(input_ids), expected, rtol=1e-4, atol=1e-4)


# Gradient checkpointing


def loss_and_gradients(model, batch):
    """(loss, gradients by name, bytes kept for the backward pass, block forwards inside the backward pass)."""
    kept, runs = [], []
    # a hook before the forward: recomputation stops as soon as it has what it needs, before a hook after it
    handles = [block.register_forward_pre_hook(lambda *_: runs.append(1)) for block in model.blocks]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.nbytes)
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, trained, _ = NextToken(model)(batch)
    forwards = len(runs)
    (loss / trained).backward()
    for handle in handles:
        handle.remove()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert forwards == model.config.n_layers
    return loss.detach(), gradients, sum(kept), len(runs) - forwards


def make_batch(config, rows=1):
    input_ids = tokens(config, batch=rows)
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    document_ids = (torch.arange(config.context) // (config.context // 2 + 5)).expand(rows, -1)
    return Batch(input_ids, labels, document_ids, torch.arange(rows))


def test_gradient_checkpointing_changes_no_bit_and_keeps_less(recipe):
    """And every parameter gets a gradient."""
    batch = make_batch(recipe)
    plain = build_model(recipe).train()
    recomputing = build_model(ModelConfig(**{**vars(recipe), "gradient_checkpointing": True})).train()
    loss, gradients, kept, reruns = loss_and_gradients(plain, batch)
    other_loss, other_gradients, other_kept, other_reruns = loss_and_gradients(recomputing, batch)
    assert torch.equal(loss, other_loss)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    assert (reruns, other_reruns) == (0, recipe.n_layers)
    assert other_kept < kept / 4


def test_gradient_checkpointing_runs_only_in_training_mode():
    model = build_model(ModelConfig(**{**vars(SMALL), "gradient_checkpointing": True}))
    *_, trained_kept, reruns = loss_and_gradients(model.train(), make_batch(SMALL))
    *_, evaluated_kept, evaluated_reruns = loss_and_gradients(model.eval(), make_batch(SMALL))
    assert (reruns, evaluated_reruns) == (SMALL.n_layers, 0)
    assert trained_kept < evaluated_kept
    with torch.no_grad():
        assert torch.equal(model.train()(tokens(SMALL)), model.eval()(tokens(SMALL)))


# Initialisation


def default_run():
    """The model of config.yaml."""
    config = yaml.safe_load((Path(__file__).resolve().parents[2] / "config.yaml").read_text())
    shape = {key: value for key, value in config["model"].items() if key not in ("vocab_size", "context")}
    return ModelConfig(**shape, vocab_size=config["tokenizer"]["vocab_size"], context=256)


FIRST_LOSS = {
    "helium-13m": ModelConfig(vocab_size=32000, context=256, n_layers=8, d_model=256, n_heads=8, n_kv_heads=2,
                              d_ff=640, window=64, global_every=None),
    "default run": default_run(),
    "default shape": ModelConfig(context=128),
    "wide": ModelConfig(vocab_size=8192, context=64, n_layers=2, d_model=2048, n_heads=16, n_kv_heads=8, d_ff=2048),
    "deep": ModelConfig(vocab_size=1024, context=64, n_layers=30, d_model=64, n_heads=4, n_kv_heads=4, d_ff=128),
    "one layer": ModelConfig(vocab_size=512, context=64, n_layers=1, d_model=48, n_heads=3, n_kv_heads=1, d_ff=64),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("shape", FIRST_LOSS)
def test_the_first_loss_is_that_of_knowing_nothing(shape):
    """Within 2% of ln V, although the tied head favours the token it has just read."""
    config = FIRST_LOSS[shape]
    model = build_model(config).train()
    generator = torch.Generator().manual_seed(0)
    input_ids = (config.vocab_size ** torch.rand(4, config.context, generator=generator)).long()  # Zipf's law, as text
    labels = input_ids.roll(-1, dims=1)
    loss, trained, _ = NextToken(model)(Batch(input_ids, labels, torch.zeros_like(input_ids), torch.arange(4)))
    assert float(loss / trained) == pytest.approx(math.log(config.vocab_size), rel=0.02)


def test_weights_depend_on_the_seed_alone():
    first = build_model(SMALL, seed=3).state_dict()
    torch.manual_seed(99)
    torch.randn(5)
    again, other = build_model(SMALL, seed=3).state_dict(), build_model(SMALL, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if torch.equal(first[name], other[name])} == {
        name for name in first if "norm" in name
    }
    assert first["blocks.0.attention.query.weight"].std() > 0


def test_initialising_leaves_the_global_generator_alone():
    model = build_model(SMALL)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    model.initialise(5)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("layers", [1, 2, 18])
def test_what_writes_to_the_residual_stream_shrinks_with_depth(layers):
    config = ModelConfig(vocab_size=64, context=8, n_layers=layers, d_model=128, n_heads=4, n_kv_heads=2, d_ff=192)
    weights = build_model(config).state_dict()
    for name, fan_in, scale in (
        ("attention.query", 128, 1), ("attention.key", 128, 1), ("attention.value", 128, 1),
        ("feed_forward.gate", 128, 1), ("feed_forward.up", 128, 1),
        ("attention.output", 128, (2 * layers) ** -0.5), ("feed_forward.down", 192, (2 * layers) ** -0.5),
    ):  # fmt: skip
        std = float(weights[f"blocks.{layers - 1}.{name}.weight"].std())
        assert std == pytest.approx(scale * fan_in**-0.5, rel=0.05), name


@torch.no_grad()
@pytest.mark.parametrize("copy_init", [0.0, 1.0, 2.0])
def test_copy_init_makes_attention_pass_on_what_it_looks_at(copy_init):
    """Where a token sees only itself, its share in attention's output is the strength asked for."""
    config = ModelConfig(vocab_size=64, context=32, n_layers=8, d_model=128, n_heads=8, n_kv_heads=2, window=1,
                         global_every=None, copy_init=copy_init)  # fmt: skip
    model = build_model(config)
    x = torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(0))
    rotation = model.rotary_local(torch.arange(32)[None])
    mask = Layout.of(None, 32, x.device).mask(1)
    for block in model.blocks:
        share = float((block.attention(x, rotation, mask) * x).sum() / (x * x).sum())
        assert share == pytest.approx(copy_init / 4, abs=0.08)  # 4: sqrt of twice the layers


@torch.no_grad()
def test_the_embedding_scale_multiplies_what_enters_the_first_block_alone(awake):
    config = ModelConfig(**{**vars(SMALL), "embedding_scale": 3.0})
    scaled, plain, input_ids = awake(config), awake(SMALL), tokens(SMALL)
    plain.embedding.weight.mul_(3)
    torch.testing.assert_close(scaled.hidden_states(input_ids), plain.hidden_states(input_ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled(input_ids), plain(input_ids) / 3, rtol=1e-4, atol=1e-4)


def test_a_state_dict_holds_parameters_only():
    model = build_model(SMALL)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# Precision


@torch.no_grad()
def test_autocast_keeps_norms_and_the_residual_stream_in_fp32(awake):
    model, input_ids = awake(SMALL), tokens(SMALL)
    plain = model.hidden_states(input_ids)
    seen = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(input_ids)
        assert model.blocks[0].attention.query(hidden).dtype == torch.bfloat16
    handle.remove()
    assert seen == [torch.float32] and hidden.dtype == torch.float32
    error = (hidden - plain).abs().max()
    assert 0 < error < 0.1 * plain.abs().max()


@torch.no_grad()
def test_weights_in_bfloat16_compute_in_bfloat16(awake):
    """All but the norms, and close to what fp32 gives."""
    plain = awake(SMALL)(tokens(SMALL))
    found = awake(SMALL).bfloat16()(tokens(SMALL))
    assert found.dtype == torch.bfloat16
    assert (found - plain).abs().mean() < 0.05 * plain.std()
