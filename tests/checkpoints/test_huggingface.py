"""Stock Hugging Face folders: our logits equal theirs, and what our model does not compute is refused by name."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints import CheckpointError, huggingface, load_model, locate, read_model, stop_ids, text_start
from distill.teachers import local
from models import build_model
from models.inference.ready import for_decoding
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             max_position_embeddings=128)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 100_000.0}
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
# SmolLM2-135M as published, its width apart: the depth, heads, base and epsilon that configs/smollm-135m.yaml has
SMOLLM2 = dict(
    vocab_size=97, hidden_size=36, intermediate_size=96, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {
    "SmolLM2": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2, rope_parameters=ROPE)),
    "Llama, untied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
    ),
    "Llama, wide heads": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=6, head_dim=20)
    ),
    "Mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16, rope_parameters=ROPE)
    ),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    ),
    "Ministral": lambda: transformers.MinistralForCausalLM(
        transformers.MinistralConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=MIXED, rope_parameters=ROPE
        )
    ),
    "Qwen3, windows": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SMALL, num_key_value_heads=2, head_dim=16, use_sliding_window=True, sliding_window=16, layer_types=MIXED,
        )
    ),
    "GraniteSWA": lambda: transformers.GraniteSWAForCausalLM(
        transformers.GraniteSWAConfig(
            **SMALL, num_key_value_heads=2, sliding_window=16, layer_types=MIXED, embedding_multiplier=3.0,
            layer_rope_theta=[100.0, 100.0, 10_000.0], attention_multiplier=8**-0.5, pad_token_id=None,
            bos_token_id=1, eos_token_id=1,
        )
    ),
    "Mellum": lambda: transformers.MellumForCausalLM(
        transformers.MellumConfig(
            **SMALL, num_key_value_heads=2, head_dim=16, sliding_window=16, layer_types=MIXED,
            mlp_layer_types=["dense"] * 3, num_experts=1, num_experts_per_tok=1, rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        )
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=6, n_positions=128)
    ),
}


def awake(model):
    """Random weights of a size at which every term shows in the logits, norms and biases included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # ours has none: they are off
                parameter.fill_(-1e4)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                width = parameter.shape[1] if "wte" in name or "embed" in name else max(parameter.shape)
                parameter.copy_(torch.randn_like(parameter) * width**-0.5 * 1.5)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """folder(name): a stock model with random weights, and its folder as transformers saves it."""

    def folder(name):
        model = awake(MODELS[name]())
        model.save_pretrained(tmp_path / "stock")
        Tokenizer.train(["a text to train on"], 1024).save(tmp_path / "stock")
        return model, tmp_path / "stock"

    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_stock_model(folder, name):
    theirs, path = folder(name)
    ours, _, config = load_model(path)
    input_ids = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids, use_cache=False).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(input_ids), expected, rtol=1e-4, atol=1e-4)
    sinks = sum(p.numel() for key, p in theirs.named_parameters() if key.endswith("sinks"))
    assert sum(p.numel() for p in ours.parameters()) == config.parameters()["total"] == theirs.num_parameters() - sinks


@torch.no_grad()
def test_cached_decoding_of_a_gpt2_equals_its_full_pass(folder):
    ours, _, _ = load_model(folder("GPT-2")[1])
    input_ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    state = ours.new_state(2)
    parts = [ours.step(part, state) for part in input_ids.split([17, 1, 1, 21], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(input_ids), rtol=1e-4, atol=1e-4)


def test_bf16_weights_in_several_files_are_read(folder):
    theirs, path = folder("Llama, untied")
    (path / "model.safetensors").unlink()
    tensors = [(name, tensor.bfloat16()) for name, tensor in theirs.state_dict().items()]
    half = len(tensors) // 2
    save_file(dict(tensors[:half]), path / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[half:]), path / "model-00002-of-00002.safetensors")
    _, weights = read_model(path)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert torch.equal(weights["embedding.weight"], theirs.model.embed_tokens.weight.bfloat16().float())


def test_what_is_stored_once_more_by_another_name_is_not_read(folder):
    """As Mistral publishes its models; with an index, only the files that it names are the weights."""
    theirs, path = folder("Mistral")
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, path / "consolidated.safetensors")
    expected = read_model(path)[1]
    half = len(tensors) // 2
    parts = {"model-00001-of-00002.safetensors": list(tensors)[:half],
             "model-00002-of-00002.safetensors": list(tensors)[half:]}  # fmt: skip
    for name, kept in parts.items():
        save_file({key: tensors[key] for key in kept}, path / name)
    (path / "model.safetensors").unlink()
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, kept in parts.items() for key in kept}}))
    found = read_model(path)[1]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="index.json is no index of weights"):
        read_model(path)


def test_newcomer_what_an_older_save_left_beside_model_safetensors_is_told_and_not_read(folder, caplog):
    """The choice is that of `transformers`: compared with what it loads itself."""
    theirs, path = folder("SmolLM2")
    stale = {name: tensor * 0 for name, tensor in theirs.state_dict().items()}
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    keys = list(stale)
    for name, kept in zip(names, (keys[:9], keys[9:]), strict=True):
        save_file({key: stale[key].clone() for key in kept}, path / name)
    index = path / "model.safetensors.index.json"
    where = {key: names[number >= 9] for number, key in enumerate(keys)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    expected = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()["model.embed_tokens.weight"]
    for _ in range(2):
        assert torch.equal(read_model(path)[1]["embedding.weight"], expected) and expected.any()
    assert [record.getMessage() for record in caplog.records if record.name == "checkpoints.huggingface"] == [
        f"{path}: its weights are read from model.safetensors, as transformers does; beside it, of another save and "
        f"not read: {index.name}, {names[0]}, {names[1]} (remove what is not the model's)"
    ]
    digest = local.identity(str(path), path)
    (path / names[0]).write_bytes(b"what nobody reads makes no other model")
    assert local.identity(str(path), path) == digest


def test_newcomer_two_files_with_the_same_weight_are_refused(folder):
    """Shards of two saves without an index: neither set is the model more than the other."""
    theirs, path = folder("SmolLM2")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    save_file({"model.norm.weight": theirs.model.norm.weight * 2}, path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"another file of its folder has too \(model.norm.weight\)"):
        read_model(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder, dtype):
    theirs, path = folder("SmolLM2")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in theirs.state_dict().items() if key != "lm_head.weight"}
    save_file({**tensors, name: tensors[name].to(dtype)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"quantised weights are not read: {name} \({dtype}\)"):
        read_model(path)


def test_other_words_for_the_same_mathematics_are_understood(folder):
    theirs, path = folder("SmolLM2")
    config = json.loads((path / "config.json").read_text())
    config |= {"hidden_act": "swish", "rope_scaling": {"rope_type": "default"}}
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (path / "config.json").write_text(json.dumps(config))
    assert read_model(path)[0].rope_base_global == ROPE["rope_theta"]


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("SmolLM2", {"model_type": "mamba"}, "model_type is 'mamba'; use one of llama, mistral, qwen3, gpt2"),
        ("SmolLM2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("SmolLM2", {"attention_bias": True}, "attention_bias is True"),
        ("SmolLM2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "asks for 'llama3'"),
        ("SmolLM2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for 'linear'"),
        ("SmolLM2", {"rope_scaling": 2.0}, "rope_scaling is 2.0: use an object"),
        ("SmolLM2", {"model_type": ["llama"]}, "model_type is ['llama']; use one of llama"),
        ("SmolLM2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ("SmolLM2", {"num_attention_heads": 8}, "n_kv_heads 3: use a divisor"),
        ("SmolLM2", {"num_hidden_layers": 31}, "missing: blocks.30"),
        ("SmolLM2", {"num_hidden_layers": 29}, "not ours: blocks.29"),
        ("SmolLM2", {"intermediate_size": 95}, "of another shape: blocks.0.feed_forward"),
        ("SmolLM2", {"hidden_size": None}, "hidden_size is missing"),
        ("SmolLM2", {"rope_parameters": {"type": "linear", "factor": 2.0}}, "asks for 'linear'"),
        ("SmolLM2", {"rope_parameters": [1]}, "rope_parameters is [1]: use an object"),
        ("SmolLM2", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4': use a number"),
        ("SmolLM2", {"num_hidden_layers": "2"}, "num_hidden_layers is '2': use a whole number"),
        ("SmolLM2", {"hidden_size": 48.0}, "hidden_size is 48.0: use a whole number"),
        ("SmolLM2", {"rms_norm_eps": True}, "rms_norm_eps is True: use a number"),
        ("SmolLM2", {"layer_types": ["sliding_attention"] * 30}, "of which a llama without windows knows nothing"),
        ("Ministral", {"layer_types": MIXED[::-1]}, "at no regular distance"),
        ("Ministral", {"layer_types": ["linear_attention"] * 3}, "layer_types is ['linear_attention', "),
        ("Ministral", {"layer_types": MIXED[:2]}, "for each of the 3 layers"),
        ("Ministral", {"sliding_window": None}, "layer_types has sliding_attention"),
        ("Qwen3, windows", {"layer_types": None}, "use_sliding_window is True"),
        ("Qwen3, windows", {"use_sliding_window": False}, "layer_types has sliding_attention"),
        ("GraniteSWA", {"layer_rope_theta": [1e2, 1e3, 1e4]}, "have the rotary bases 100.0 and 1000.0"),
        ("GraniteSWA", {"layer_rope_theta": [1e2, 1e2, 0]}, "use a number above 0 for each"),
        ("GraniteSWA", {"layer_types": None}, "at no regular distance"),
        ("GraniteSWA", {"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
        ("GraniteSWA", {"attention_multiplier": 1.0}, "attention_multiplier is 1.0"),
        ("Mellum", {"mlp_layer_types": None}, "mlp_layer_types is None"),
        ("Mellum", {"rope_parameters": ROPE}, "use an object for each of layer_types"),
        ("GPT-2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ],
)  # fmt: skip
def test_what_our_model_does_not_compute_is_refused(folder, name, change, told):
    _, path = folder(name)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert told in str(error.value) and str(path) in str(error.value)


def test_a_sink_that_takes_part_is_refused(folder):
    theirs, path = folder("GraniteSWA")
    theirs.model.layers[1].self_attn.sinks.data[2] = -3.0
    theirs.save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.sinks reaches -3: our model has no attention sinks"):
        load_model(path)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_and_named_back_is_what_was_stored(folder, name):
    from safetensors.torch import load_file

    _, path = folder(name)
    config, weights = read_model(path)
    kind = json.loads((path / "config.json").read_text())["model_type"]
    stored, named = load_file(path / "model.safetensors"), huggingface.stock_weights(kind, config, weights)
    assert named.keys() == stored.keys() and all(torch.equal(named[key], stored[key]) for key in stored)


def test_a_head_that_is_stored_and_said_to_be_the_embedding_is_refused_if_it_is_not(folder):
    """transformers 4 takes the embedding, transformers 5 what is stored: nobody can tell which is meant."""
    theirs, path = folder("SmolLM2")
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    assert load_model(path)[2].tied_head
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true .* lm_head\.weight is not its embedding"):
        load_model(path)


def test_a_mistral_that_names_no_window_has_the_stock_one(folder):
    _, path = folder("Mistral")
    config = json.loads((path / "config.json").read_text())
    windows = {}
    for given in ({"sliding_window": 16}, {"sliding_window": None}, {}):
        config.pop("sliding_window", None)
        (path / "config.json").write_text(json.dumps(config | given))
        windows[str(given)] = (load_model(path)[2].window, transformers.AutoConfig.from_pretrained(path).sliding_window)
    assert list(windows.values()) == [(16, 16), (None, None), (4096, 4096)]


def test_a_pickle_is_never_read(folder):
    _, path = folder("GPT-2")
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no \\*.safetensors: weights are loaded from safetensors files only"):
        load_model(path)


def test_our_own_checkpoints_are_no_hugging_face_folders(tmp_path):
    assert not huggingface.is_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert huggingface.is_folder(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")  # as our own exports have one
    assert huggingface.is_folder(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    assert not huggingface.is_folder(tmp_path)


def test_an_export_for_another_program_is_told_as_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "slms_flow"}')
    with pytest.raises(CheckpointError, match="made for another program by convert.py, .* use the checkpoint that it"):
        load_model(tmp_path)


def test_the_recipe_takes_smollm2s_shape(folder):
    """What the published config says, at its real width, is what configs/smollm-135m.yaml says."""
    from settings import read, validate
    from training.settings import RunConfig

    _, path = folder("SmolLM2")
    config = json.loads((path / "config.json").read_text())
    config |= {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}
    (path / "config.json").write_text(json.dumps(config))
    theirs = huggingface._llama_shape(huggingface._Asked(path / "config.json", config))
    recipe = validate(RunConfig, read("configs/smollm-135m.yaml")).model.config(49152, 2048)
    assert theirs.identity() == recipe.identity()
    assert build_model(recipe, device="meta").config.parameters()["total"] == 134_515_008


class Made(TorchDispatchMode):
    """Counts the elements of each type of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        out = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.elements[tensor.dtype] += tensor.numel()
        return out


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3", "Llama, untied", "GPT-2"])
def test_weights_are_read_straight_in_bf16(folder, name):
    """No matrix is ever fp32, norms are, and what decodes is bit for bit what had been loaded in fp32."""
    theirs, path = folder(name)
    theirs.bfloat16().save_pretrained(path)
    with Made() as made:
        model, _, config = load_model(path, dtype=torch.bfloat16, context=64)
    norms = {key: tensor.dtype for key, tensor in model.named_parameters() if "norm" in key}
    others = {tensor.dtype for key, tensor in model.named_parameters() if "norm" not in key}
    assert set(norms.values()) == {torch.float32} and others == {torch.bfloat16}
    tables = sum(tensor.numel() for tensor in model.buffers())
    assert made.elements[torch.float32] < 10 * tables + 10 * config.vectors < config.parameters()["total"]
    ids = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(1))
    for weights in ("bf16", "int8"):
        straight, usual = load_model(path, dtype=torch.bfloat16)[0], load_model(path)[0]
        found, expected = for_decoding(straight, weights)(ids), for_decoding(usual, weights)(ids)
        assert torch.equal(found, expected) if weights == "bf16" else torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3", "GPT-2"])
def test_a_shorter_context_costs_less_and_changes_nothing_within_it(folder, name):
    _, path = folder(name)
    whole, _, config = load_model(path)
    short, _, bounded = load_model(path, context=40)
    assert (config.context, bounded.context, load_model(path, context=1000)[2].context) == (128, 40, 128)
    assert [cache.capacity for cache in short.new_state(1).layers] == [40] * 3
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(short(ids), whole(ids))
    sizes = [sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()]) for model in (short, whole)]
    assert sizes[0] < sizes[1]
    with pytest.raises(ValueError, match="context of 40"):
        short(torch.zeros(1, 41, dtype=torch.int64))


def test_where_texts_begin_and_end(folder):
    _, path = folder("Qwen3")
    tokenizer = Tokenizer.load(path)
    assert text_start(path, tokenizer) == text_start("runs/x", tokenizer) == [tokenizer.end_of_text]
    tokenizer.declares_begin = False  # as Qwen3's
    assert text_start(path, tokenizer) == [] and text_start("runs/x", tokenizer) == [tokenizer.end_of_text]
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    for file, named, expected in (
        ("config.json", None, [0]), ("config.json", 7, [0, 7]), ("generation_config.json", [9, 5, 5000], [0, 5, 9]),
        ("generation_config.json", None, [0, 7]),
    ):  # fmt: skip
        (path / file).write_text(json.dumps(config | {"eos_token_id": named}))
        assert stop_ids(path, tokenizer) == expected
    assert stop_ids("runs/x", tokenizer) == [0]
    for text in ('{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "[]", "{"):
        (path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="generation_config.json"):
            stop_ids(path, tokenizer)


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """A Qwen3 in the Hub's cache as hub:someone/small, without a network."""
    from huggingface_hub import constants

    path = folder("Qwen3")[1]
    repository = tmp_path / "cache" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.move(path, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / ("0" * 40)


def test_a_model_of_the_hub_is_a_folder_in_its_cache(cached):
    for only_cached in (False, True):
        assert locate("hub:someone/small", only_cached) == cached
    model, tokenizer, config = load_model("hub:someone/small")
    assert config == load_model(cached)[2] and torch.equal(
        model.embedding.weight, load_model(cached)[0].embedding.weight
    )
    assert text_start("hub:someone/small", tokenizer) == [0]
    (cached / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert stop_ids("hub:someone/small", tokenizer) == [0, 5, 9]


def test_what_the_hub_cannot_give_is_told_in_one_line(cached):
    for name, told in (
        ("hub:small", "write a model of the Hub as hub:OWNER/NAME"),
        ("hub:a/b/c", "write a model of the Hub as hub:OWNER/NAME"),
        ("hub:someone/other", "hub:someone/other could not be loaded from the Hub or its cache .* name a local folder"),
    ):
        with pytest.raises(CheckpointError, match=told) as error:
            load_model(name)
        assert "\n" not in str(error.value)
    (cached / "config.json").unlink()
    with pytest.raises(CheckpointError, match="someone/small has no config.json on the Hub, or only some"):
        load_model("hub:someone/small")


def test_nothing_but_data_is_asked_of_the_hub(cached, monkeypatch):
    """As its own filter takes the patterns: no pickle, no code, no second copy of the weights."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how, name=name) or cached
    )
    load_model("hub:someone/small")
    there = ["config.json", "generation_config.json", "model-1-of-2.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip
    not_wanted = ["pytorch_model.bin", "modeling_x.py", "original/model.safetensors", "onnx/config.json", "README.md",
                  "consolidated.safetensors", "training_args.pt"]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert asked["name"] == "someone/small"
    assert list(filter_repo_objects(there + not_wanted, **patterns)) == there
