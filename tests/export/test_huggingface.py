"""Hugging Face folders: transformers computes what the checkpoint does for every recipe that has a stock class, our own
reader finds what was written, and the classes that load and compute something else are found out."""

import dataclasses
import itertools
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

import convert
from checkpoints import huggingface as names
from checkpoints import load_model, read_model, stop_ids, text_start
from export import ExportFault, Options, bundle, huggingface, stock
from export.parity import GRAPH, compare
from export.trained import load
from tests.export.checkpoint_of import save_checkpoint
from tests.export.stock_models import RECIPES, recipe, tokenizer, trained_as
from tokenizer.conversations import ChatFormat, begun

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

CLASSES = {
    "smollm-135m": "llama", "slm-tinystories": "gpt2", "helium-13m": "mistral", "helium-nano-45m": "mistral",
    "flow-1b": "granite_swa", "flow-qwen": "mellum", "../config": "granite_swa", "tinystories-cpu": "granite_swa",
    "smolm135": None,
}  # fmt: skip
ONE_BASE = {"flow-1b": "ministral", "flow-qwen": "qwen3"}
FOLDED = {"smollm-135m": "llama", "slm-tinystories": "gpt2", "helium-13m": "mistral", "flow-qwen": "mellum"}
CASES = {
    **{name: (recipe(name), kind) for name, kind in CLASSES.items() if kind},
    **{f"{name}, one base": (recipe(name, rope_base_global=recipe(name).rope_base), kind)
       for name, kind in ONE_BASE.items()},
    **{f"{name}, scaled": (recipe(name, embedding_scale=1.7, norm_eps=1e-3), kind) for name, kind in FOLDED.items()},
    "untied": (recipe("../config", tied_head=False), "granite_swa"),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A checkpoint, its folder, the report, and the class that is expected."""
    config, kind = CASES[request.param]
    trained, folder = trained_as(config), tmp_path_factory.mktemp("hf") / "out"
    return trained, folder, bundle.export(trained, "hf", Options(), folder), kind


def ours(trained):
    """A prompt past every window, and the checkpoint's logits."""
    ids = bundle.long_prompt(trained)
    return ids, trained.model(torch.tensor([ids]))[0].numpy()


def edited(folder, **changed):
    """config.json with other keys."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def test_every_recipe_is_here():
    assert set(CLASSES) == set(RECIPES)


def test_transformers_computes_what_the_checkpoint_does(exported):
    """Past the window and with both bases; what it reads is what our own reader does."""
    trained, folder, report, kind = exported
    ids, expected = ours(trained)
    windows = {trained.config.layer_window(layer) or 0 for layer in range(trained.config.n_layers)}
    assert len(ids) > max(windows) and report["home"]["class"] == kind
    graph = report["parity"]["graph"]
    assert graph["relative"] <= GRAPH.relative and graph["positions"] == len(ids) and graph["range"] > 0.5
    model, known, config = load_model(folder)
    assert not compare(expected, model(torch.tensor([ids]))[0].numpy()).problems(GRAPH)
    assert text_start(folder, known) == trained.begin and stop_ids(folder, known) == trained.stops
    if not report["home"]["changes"]:
        assert config.identity() == trained.config.identity()
        read, written = read_model(folder)[1], trained.model.state_dict()
        assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in written)
    else:
        assert trained.config.embedding_scale != 1 and config.embedding_scale == 1


WRONG = {  # (recipe, keys of config.json that make it another home)
    "windows dropped": ("flow-1b", {"layer_types": ["full_attention"] * recipe("flow-1b").n_layers}),
    "a window one larger": ("flow-1b", {"sliding_window": 129}),
    "a window one smaller": ("flow-1b", {"sliding_window": 127}),
    "the base from another key": ("flow-1b", {"layer_rope_theta": None}),
    "no scale": ("../config", {"embedding_multiplier": 1.0}),
    "mistral as llama": ("helium-13m", {"model_type": "llama"}),
    "mellum with one base": ("flow-qwen", {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}}),
    "mellum as qwen3": ("flow-qwen", {"model_type": "qwen3", "use_sliding_window": True,
                                      "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(recipe): a checkpoint and its folder, of which config.json is written anew for each test."""
    made = {}

    def folder(name):
        if name not in made:
            trained, path = trained_as(recipe(name)), tmp_path_factory.mktemp("wrong") / "out"
            bundle.export(trained, "hf", Options(), path)
            made[name] = trained, path, (path / "config.json").read_text()
        trained, path, config = made[name]
        (path / "config.json").write_text(config)
        return trained, path

    return folder


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_home_loads_and_is_found_out(folders, wrong):
    name, keys = WRONG[wrong]
    trained, folder = folders(name)
    ids, expected = ours(trained)
    edited(folder, **keys)
    assert compare(expected, huggingface.logits(folder, ids)).problems(GRAPH)


def test_names_that_are_wrong_in_both_directions_are_found_out(tmp_path, monkeypatch):
    """Our own reader undoes what the writer did; transformers does not."""
    swapped = {"mlp.gate_proj": "mlp.up_proj", "mlp.up_proj": "mlp.gate_proj"}
    table = tuple((next((theirs.replace(a, b) for a, b in swapped.items() if a in theirs), theirs), mine)
                  for theirs, mine in names._LLAMA_NAMES)  # fmt: skip
    monkeypatch.setattr(names, "_LLAMA_NAMES", table)
    with pytest.raises(ExportFault, match="the other program computes something else than the checkpoint: relative"):
        bundle.export(trained_as(recipe("../config")), "hf", Options(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_key_that_says_something_else_is_found_out(tmp_path, monkeypatch):
    wrong = tuple(dataclasses.replace(row, keys=lambda config: stock._granite_swa(config) | {"sliding_window": 65})
                  if row.name == "granite_swa" else row for row in stock.HOMES)  # fmt: skip
    monkeypatch.setattr(stock, "HOMES", wrong)
    with pytest.raises(ExportFault, match="config.json is read back as another shape"):
        bundle.export(trained_as(recipe("../config")), "hf", Options(), tmp_path / "out")


def test_without_transformers_our_own_reader_is_what_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "version_of", lambda package: None)
    report = bundle.export(trained_as(recipe("../config")), "hf", Options(), tmp_path / "out")
    assert "graph" not in report["parity"] and report["parity"]["against_checkpoint"]["relative"] <= GRAPH.relative
    assert report["not_verified"] == ["that transformers computes the same: it is not installed here"]


def test_in_fp16_the_graph_is_exact_and_the_rounding_is_told(tmp_path, capsys):
    trained = trained_as(recipe("../config"))
    report = bundle.export(trained, "hf", Options(dtype="float16"), tmp_path / "out")
    parity = report["parity"]
    assert parity["graph"]["relative"] <= GRAPH.relative < parity["against_checkpoint"]["relative"]
    assert report["weight_bytes"] < 2.2 * trained.config.parameters()["total"] + 20_000
    huggingface.tell(report, tmp_path / "out")
    told = capsys.readouterr().out
    assert "as granite_swa, for transformers 5.15 or later" in told and "Not checked here: programs other" in told


@pytest.mark.parametrize("name", ["flow-1b", "flow-qwen"])
def test_transformers_writes_the_same_text(folders, name):
    """With its caches, past the window, and without what is never drawn, as generation_config.json says."""
    trained, folder = folders(name)
    prompt, steps = bundle.long_prompt(trained)[:120], 16
    ids, state, new = list(prompt), trained.model.new_state(1), prompt
    for _ in range(steps):
        logits = trained.model.step(torch.tensor([new]), state)[0, -1]
        logits[trained.never] = -np.inf
        new = [int(logits.argmax())]
        ids += new
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model.generate(torch.tensor([prompt]), max_length=len(ids), do_sample=False, eos_token_id=None)
    assert found[0].tolist() == ids and len(set(ids[120:])) > 3


def test_ids_and_conversations_are_ours(tmp_path):
    trained = trained_as(recipe("../config"), chats=True)
    bundle.export(trained, "hf", Options(), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in bundle.GOLDEN_TEXTS.values():
        if "<|" not in text:  # there, transformers reads marks in a text as marks
            assert theirs(text).input_ids == trained.begin + trained.tokenizer.encode(text)
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    expected = begun(trained.begin, ChatFormat(trained.tokenizer).prompt(messages))
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == expected and theirs.eos_token == "<|end|>" and theirs.bos_token == "<|endoftext|>"
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [trained.end, trained.tokenizer.end_of_text]
    ours_again = load_model(tmp_path / "out")[1]
    assert begun(trained.begin, ChatFormat(ours_again).prompt(messages)) == expected
    assert ours_again.fingerprint == tokenizer().fingerprint


def test_an_export_is_a_checkpoint_again(tmp_path, monkeypatch, capsys):
    """By the command, of a checkpoint on the disk; then whatever reads checkpoints reads the folder, and exports it."""
    run = save_checkpoint(tmp_path / "run", chats=True)
    first, again = tmp_path / "first", tmp_path / "again"
    for source, out in ((run, first), (first, again)):
        command = ["convert.py", "--checkpoint", str(source), "--to", "hf", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        assert convert.main() == 0 and "as granite_swa, for transformers 5.15 or later" in capsys.readouterr().out
    before, after = load(run), load(first)
    assert (before.begin, before.stops, before.chats) == (after.begin, after.stops, after.chats)
    ids = torch.tensor([bundle.long_prompt(before)])
    assert torch.equal(before.model(ids), after.model(ids))
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert "In the class `granite_swa`: transformers 5.15 or later." in (first / "README.md").read_text()


CALLS = {
    "--to hf --quantize int8": "--quantize int8: --to hf has no such option",
    "--to hf --io swift": "--io swift: --to hf has no such option",
    "--to gguf --quantize int8": "--quantize int8: --to gguf has none and q8_0",
    "--to coreml --quantize q8_0": "--quantize q8_0: --to coreml has none and int8 and int4 and palette4",
    "--to coreml --dtype float16": "--dtype float16: --to coreml has no such option",
    "--to gguf --quantize q8_0 --dtype float16": "--dtype float16 with --quantize q8_0: give one of them",
}


@pytest.mark.parametrize("words", CALLS)
def test_wrong_calls(words, tmp_path, monkeypatch, capsys):
    run = save_checkpoint(tmp_path / "run")
    command = ["convert.py", "--checkpoint", str(run), "--out", str(tmp_path / "out"), *words.split()]
    monkeypatch.setattr(sys, "argv", command)
    try:
        code = convert.main()
    except SystemExit as end:
        code = end.code
    assert code == 2 and capsys.readouterr().err.strip().splitlines()[-1].endswith(CALLS[words])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


REFUSED = {
    "model.positions=rope": recipe("smolm135"),
    "model.bias=false": recipe("flow-1b", bias=True),
    "model.norm=rms model.feed_forward=swiglu": recipe("flow-1b", norm="layer", feed_forward="gelu"),
    "model.n_kv_heads=8": recipe("slm-tinystories", n_kv_heads=4),
    "model.window=null": recipe("slm-tinystories", window=16),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_has_no_home_is_refused_with_the_option(options):
    trained = trained_as(REFUSED[options])
    (problem,) = huggingface.problems(trained, Options())
    assert problem.endswith(f"computes what this model does; trained with {options} it would have one")


@pytest.mark.parametrize("client", [stock.TRANSFORMERS, stock.MLX, stock.LLAMA_CPP])
def test_the_options_of_a_refusal_give_a_home(client):
    """Over all shapes."""
    shapes = itertools.product(
        ("rope", "learned"), ("rms", "layer"), ("swiglu", "gelu"), (False, True), (False, True), (None, 8),
        (None, 1, 2, 9), (2, 4), (1e4, 1e6), (False, True), (None, 16),
    )  # fmt: skip
    keys = ("positions", "norm", "feed_forward", "bias", "qk_norm", "window", "global_every", "n_kv_heads",
            "rope_base_global", "tied_head", "head_dim")  # fmt: skip
    base, homeless = recipe("../config"), 0
    for shape in shapes:
        config = dataclasses.replace(base, **dict(zip(keys, shape, strict=True)))
        if stock.home(client, config) is not None:
            continue
        homeless += 1
        told = stock.refusal(client, config).split("; trained with ")[1].removesuffix(" it would have one")
        options = dict(option.removeprefix("model.").split("=") for option in told.split())
        read = {"true": True, "false": False, "null": None}
        given = {key: read[value] if value in read else type(getattr(config, key) or 0)(float(value))
                 if value.replace(".", "").replace("e+", "").isdigit() else value for key, value in options.items()}
        assert stock.home(client, dataclasses.replace(config, **given)) is not None, (config, told)
    assert homeless > 100


@pytest.mark.campaign
def test_lm_eval_scores_the_folder(tmp_path):
    """lm-evaluation-harness, unmodified, on a task file of our own: as many right as our own logits say."""
    pytest.importorskip("lm_eval", reason="not installed: pip install lm_eval==0.4.13")
    trained, folder = trained_as(recipe("../config")), tmp_path / "out"
    bundle.export(trained, "hf", Options(), folder)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    asked = ("Is it", "Once upon a time", "12 + 30 =", "There was") * 3
    questions = [{"question": text, "choices": [" yes", " no", " 42"], "answer": number % 3}
                 for number, text in enumerate(asked)]  # fmt: skip
    (tasks / "local.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tasks / "local.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks / 'local.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
         "--tasks", "local_choice", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "1",
         "--output_path", str(tmp_path / "results")], check=True,
    )  # fmt: skip
    (found,) = (tmp_path / "results").rglob("results_*.json")
    right = sum(scored(trained, **question) for question in questions)
    assert json.loads(found.read_text())["results"]["local_choice"]["acc,none"] == right / len(questions)


def scored(trained, question, choices, answer):
    """Whether the answer is the choice of the highest likelihood."""
    start, likelihoods = trained.begin + trained.tokenizer.encode(question), []
    for choice in choices:
        rest = (trained.begin + trained.tokenizer.encode(question + choice))[len(start) :]
        logs = trained.model(torch.tensor([start + rest]))[0].log_softmax(-1)
        likelihoods.append(sum(float(logs[len(start) - 1 + place, token]) for place, token in enumerate(rest)))
    return int(np.argmax(likelihoods)) == answer
