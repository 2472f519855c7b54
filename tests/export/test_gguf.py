"""GGUF files: what a reader finds in them is what the checkpoint has. llama.cpp itself, which takes ten minutes to
build, runs in the campaign: logits past the window, and the ids of its own tokenizer."""

import dataclasses
import json
import random
import string
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from export import ExportFault, Options, bundle, gguf, stock
from export.parity import GRAPH, Bounds, compare
from tests.export.stock_models import RECIPES, recipe, tokenizer, trained_as
from tokenizer import Tokenizer
from tokenizer.bpe import SPLIT
from tokenizer.chat import CHAT_TEMPLATE, SPECIAL_TOKENS

reading = pytest.importorskip("gguf", reason="gguf is not installed: pip install -r requirements.txt")

ARCHITECTURES = {
    "smollm-135m": "llama", "slm-tinystories": "gpt2", "helium-13m": "mimo2", "helium-nano-45m": "mimo2",
    "flow-1b": "mimo2", "flow-qwen": "step35", "../config": "mimo2", "tinystories-cpu": "mimo2", "smolm135": None,
}  # fmt: skip
CASES = {
    **{name: (recipe(name), kind) for name, kind in ARCHITECTURES.items() if kind},
    "normalised, no windows": (recipe("flow-qwen", window=None, n_layers=6), "qwen3"),
    "normalised, scaled": (recipe("flow-qwen", n_layers=6, embedding_scale=1.7, norm_eps=1e-3), "step35"),
    "untied": (recipe("smollm-135m", tied_head=False, n_layers=4), "llama"),
}
F32 = Options(dtype="float32")


def fields(path):
    """The metadata of a file, as gguf reads it."""
    found = reading.GGUFReader(path).fields
    return {name: field.contents() for name, field in found.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("name", CASES)
def test_every_recipe_is_read_back_as_it_was_written(name, tmp_path):
    """By names, order of rows, and folding undone: the logits are the checkpoint's."""
    config, kind = CASES[name]
    report = bundle.export(trained_as(config), "gguf", F32, tmp_path / "out")
    assert report["home"]["class"] == kind and report["parity"]["against_checkpoint"]["relative"] <= GRAPH.relative
    assert fields(tmp_path / "out" / gguf.FILE)["general.architecture"] == kind


def test_every_recipe_has_a_home_or_is_refused():
    assert set(ARCHITECTURES) == set(RECIPES)
    (problem,) = gguf.problems(trained_as(recipe("smolm135")), Options())
    assert problem.endswith("; trained with model.positions=rope it would have one")


def test_metadata_of_mixed_windows_and_of_the_tokenizer(tmp_path):
    trained = trained_as(recipe("../config"), chats=True)
    bundle.export(trained, "gguf", Options(), tmp_path / "out")
    found = fields(tmp_path / "out" / gguf.FILE)
    expected = {
        "mimo2.context_length": trained.config.context, "mimo2.embedding_length": 16, "mimo2.block_count": 4,
        "mimo2.attention.head_count": 4, "mimo2.attention.head_count_kv": 2, "mimo2.attention.sliding_window": 64,
        "mimo2.attention.sliding_window_pattern": [True, False, True, False], "mimo2.rope.freq_base": 1e6,
        "mimo2.rope.freq_base_swa": 1e4, "mimo2.attention.key_length": 4, "mimo2.rope.dimension_count": 4,
        "mimo2.attention.layer_norm_rms_epsilon": np.float32(1e-6 / 15**2), "general.file_type": 1,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.eot_token_id": trained.tokenizer.token_id("<|end|>"),
        "tokenizer.chat_template": "{{- bos_token -}}" + CHAT_TEMPLATE,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    tokens, kinds, known = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], tokenizer()
    size = known.vocab_size
    assert len(tokens) == len(kinds) == trained.config.vocab_size > size
    assert [known.token_id(token) for token in tokens[:size]] == list(range(size))
    assert set(kinds[:16]) == {3} and set(kinds[16:size]) == {1} and set(kinds[size:]) == {5}
    merged = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merged]


def test_rows_of_queries_and_keys_are_where_llama_turns_them(tmp_path):
    """It turns channels 2i and 2i + 1 where we turn i and i + D/2; other architectures turn as we do."""
    for name, order in (("smollm-135m", [0, 2, 1, 3]), ("flow-1b", [0, 1, 2, 3])):
        trained = trained_as(recipe(name, n_layers=6))
        bundle.export(trained, "gguf", F32, tmp_path / name)
        stored = {tensor.name: tensor.data for tensor in reading.GGUFReader(tmp_path / name / gguf.FILE).tensors}
        attention, n_heads = trained.model.blocks[1].attention, trained.config.n_heads
        rows = [4 * head + row for head in range(n_heads) for row in order]
        assert np.array_equal(stored["blk.1.attn_q.weight"], attention.query.weight.numpy()[rows])
        assert np.array_equal(stored["blk.1.attn_v.weight"], attention.value.weight.numpy())
        assert np.array_equal(stored["blk.1.attn_k.weight"], attention.key.weight.numpy()[rows[: len(rows) // 3]]
                              if name == "smollm-135m" else attention.key.weight.numpy())  # fmt: skip


def test_precisions(tmp_path):
    """f16 is the weight in half, q8_0 at most half a step of its block away; vectors are never rounded."""
    trained = trained_as(recipe("tinystories-cpu"))  # of width 32: a block
    weights = trained.model.state_dict()
    sizes = []
    for options, kind in ((F32, "F32"), (Options(), "F16"), (Options(quantize="q8_0"), "Q8_0")):
        report = bundle.export(trained, "gguf", options, tmp_path / kind)
        tensors = {tensor.name: tensor for tensor in reading.GGUFReader(tmp_path / kind / gguf.FILE).tensors}
        up, expected = tensors["blk.2.ffn_up.weight"], weights["blocks.2.feed_forward.up.weight"].numpy()
        found = reading.quants.dequantize(up.data, up.tensor_type)
        step = (0.5 / 127 + 2**-11) * np.abs(expected).max(1, keepdims=True)  # half of one, and its scale's rounding
        most = {"F32": 0, "F16": 2**-11 * np.abs(expected), "Q8_0": step}[kind]
        assert up.tensor_type.name == kind and (np.abs(found - expected) <= most).all()
        assert tensors["blk.2.attn_norm.weight"].tensor_type.name == "F32"
        assert np.array_equal(tensors["blk.2.attn_norm.weight"].data, weights["blocks.2.attention_norm.weight"].numpy())
        assert not report["kept_in_f16"]
        sizes.append(report["weight_bytes"])
    assert sizes[0] > 1.4 * sizes[1] > 1.4 * sizes[2]


def test_rows_that_are_no_blocks_stay_in_f16_and_are_told(tmp_path):
    report = bundle.export(trained_as(recipe("../config")), "gguf", Options(quantize="q8_0"), tmp_path / "out")
    assert "blk.0.attn_q.weight" in report["kept_in_f16"] and "blk.0.ffn_down.weight" not in report["kept_in_f16"]


def test_a_wrong_order_of_rows_is_found_out(tmp_path, monkeypatch):
    turned = gguf._turned
    monkeypatch.setattr(gguf, "_turned", lambda row, config, name, tensor, back=False: (
        tensor if back else turned(row, config, name, tensor)))  # fmt: skip
    with pytest.raises(ExportFault, match="what was written computes something else than the checkpoint"):
        bundle.export(trained_as(recipe("smollm-135m", n_layers=4)), "gguf", F32, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def definition(pre_tokenizer, normalizer=None):
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        engine.normalizer = normalizer
    return json.loads(engine.to_str())


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), BYTES]),
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
}
UNKNOWN = {
    "another pattern": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated"), BYTES]),
    "a space before the text": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "words": pre_tokenizers.Whitespace(),
    "numbers whole": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), WORDS]),
}


def test_how_llama_cpp_calls_what_splits_text():
    for name, splits in SPLITS.items():
        assert gguf._pre(definition(splits)) == name
    assert gguf._pre(definition(SPLITS["qwen2"], normalizers.NFC())) == "qwen2"  # as Qwen's own
    assert gguf._pre(definition(SPLITS["qwen2"], normalizers.Lowercase())) is None
    for unknown in UNKNOWN.values():
        assert gguf._pre(definition(unknown)) is None


def test_problems(monkeypatch):
    trained = trained_as(recipe("../config"))
    assert gguf.problems(trained, Options()) == []
    (both,) = gguf.problems(trained, Options(dtype="float16", quantize="q8_0"))
    assert both == "--dtype float16 with --quantize q8_0: give one of them"
    monkeypatch.setattr(gguf, "_pre", lambda definition: None)
    (problem,) = gguf.problems(trained, Options())
    assert "llama.cpp has no name for the way in which its tokenizer splits text" in problem


# What llama.cpp itself makes of the files.
SAME = Bounds(top1=0.99, relative=1e-3)  # its GELU is a table in fp16; without one, the two agree to a millionth
ABSENT = "not installed: pip install llama-cpp-python==0.3.36, which builds it: ten minutes, cmake and a C++ compiler"


@pytest.mark.campaign
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_the_checkpoint_does(name, tmp_path):
    pytest.importorskip("llama_cpp", reason=ABSENT)
    trained = trained_as(CASES[name][0])
    bundle.export(trained, "gguf", F32, tmp_path / "out")
    window = trained.config.layer_window(0) or 0
    ids = np.random.default_rng(0).integers(2, trained.tokenizer.vocab_size, window + 120).tolist()
    ids = ids[: trained.config.context - 8]
    expected = trained.model(torch.tensor([ids]))[0].numpy()
    for chunks in ([len(ids)], [90, 20, *[1] * (len(ids) - 110)]):  # at once, and as a client writes
        parity = compare(expected, gguf.logits(tmp_path / "out" / gguf.FILE, ids, chunks))
        assert not parity.problems(SAME), parity


@pytest.mark.campaign
@pytest.mark.parametrize("wrong", ["windows dropped", "one base", "a window one larger"])
def test_llama_cpp_with_a_wrong_home(wrong, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason=ABSENT)
    changed = {"windows dropped": {"attention.sliding_window": 4096}, "one base": {"rope.freq_base_swa": 1e6},
               "a window one larger": {"attention.sliding_window": 129}}[wrong]  # fmt: skip
    rows = tuple(dataclasses.replace(row, keys=lambda config: stock._gguf_windows(config) | changed)
                 if row.name == "mimo2" else row for row in stock.HOMES)  # fmt: skip
    monkeypatch.setattr(stock, "HOMES", rows)
    trained = trained_as(recipe("flow-1b"))
    bundle.export(trained, "gguf", F32, tmp_path / "out")
    ids = np.random.default_rng(0).integers(2, trained.tokenizer.vocab_size, 228).tolist()
    expected = trained.model(torch.tensor([ids]))[0].numpy()
    assert compare(expected, gguf.logits(tmp_path / "out" / gguf.FILE, ids)).problems(SAME)


def mixtures(seed, count):
    """Texts of words, digits, spaces, lines, marks and signs in any order."""
    chance = random.Random(seed)
    pieces = [*" \n\r\t", "\r\n", "  ", *string.punctuation, *string.digits, "It's", "don't", "WORD", "Straße", "naïve",
              "e\u0302", "\u0928\u092e\u0938\u094d\u0924\u0947", "中文", "\U0001f642", "\u00a0", "\u200d"]  # fmt: skip
    every = [*pieces, *string.ascii_letters, *string.ascii_lowercase]
    return ["".join(chance.choices(every, k=chance.randrange(1, 60))) for _ in range(count)]


def learned(splits):
    """A tokenizer whose merges are those of text split in this way, so that another split gives other ids."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = SPLITS[splits]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    engine.train_from_iterator([text, *mixtures(seed=1, count=4000)], trainer)
    return Tokenizer(engine.to_str())


@pytest.mark.campaign
@pytest.mark.parametrize("splits", SPLITS)
def test_llama_cpp_gives_the_ids_of_our_tokenizer(splits, tmp_path):
    """Of 200 texts: the golden ones and random mixtures; then of a conversation. By each way to split text."""
    llama_cpp = pytest.importorskip("llama_cpp", reason=ABSENT)
    known = learned(splits)
    trained = trained_as(recipe("../config", n_layers=2, vocab_size=known.vocab_size + 3), chats=True)
    trained = dataclasses.replace(trained, tokenizer=known)
    bundle.export(trained, "gguf", Options(), tmp_path / "out")
    assert fields(tmp_path / "out" / gguf.FILE)["tokenizer.ggml.pre"] == splits
    model = llama_cpp.Llama(str(tmp_path / "out" / gguf.FILE), vocab_only=True, verbose=False)
    texts = [*mixtures(seed=0, count=194), *bundle.GOLDEN_TEXTS.values()]
    assert len(texts) == 200
    for text in texts:
        found = model.tokenize(text.encode(), add_bos=True, special=False)
        assert found == trained.begin + trained.tokenizer.encode(text), repr(text)
    chat = "<|user|>Hello<|end|><|assistant|>"
    marked = trained.tokenizer.encode(chat, allow_special=True)
    assert model.tokenize(chat.encode(), add_bos=False, special=True) == marked
