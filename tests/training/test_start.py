"""What only the prepared data, the machine or the disk can show about a run ends it with a sentence, no traceback."""

import sys

import pytest

from settings import ConfigError, read, validate
from tests import warm
from training.parallel import LaunchError
from training.resume import RunMismatch
from training.settings import RunConfig
from training.start import start
from training.trainer import Outcome

SHORT = "phases=[{name: short, context: 64, data: {stories: 1}, tokens: 2048, batch_tokens: 1024}]"


def train(arguments: list[str]) -> Outcome:
    return start(validate(RunConfig, read(arguments[1], arguments[2:])))


def test_a_sample_prompt_that_fills_the_context_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"watch\.sample_prompts\.1.*context of 64"):
        train(tiny("x", SHORT, f"watch.sample_prompts=['', '{'word salad ' * 100}']"))
    assert not (tmp_path / "runs" / "x" / "metrics.jsonl").exists()


def test_a_device_that_is_not_there_is_not_replaced_by_another(tiny, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that cannot be hidden any more")
    with pytest.raises(LaunchError, match=r"parallel\.device is cuda"):
        train(tiny("x", SHORT, "parallel.device=cuda"))


def test_a_log_has_its_lines_in_the_order_in_which_things_happen(tiny, tmp_path):
    """Preparation is told before the phase that follows it, though Python holds back what goes to a file."""
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "multigpu_train.py", *tiny("x", SHORT)]
        assert warm.Popen(command, stdout=log, stderr=log).wait(300) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    beginnings = ["stories: ", "phase short", "finished: "]
    order = [next(n for n, line in enumerate(lines) if line.startswith(words)) for words in beginnings]
    assert order == sorted(order)


def test_a_micro_batch_far_above_the_batch_costs_nothing(tiny):
    assert train(tiny("x", SHORT, "phases.0.micro_batch=1_000_000_000_000")) is Outcome.FINISHED


def test_a_run_from_other_weights_keeps_their_tokenizer_and_is_resumed(tiny):
    assert train(tiny("first", SHORT)) is Outcome.FINISHED
    longer = SHORT.replace("context: 64", "context: 128")  # weights fit any context
    there = tiny("first")[3].removeprefix("run.folder=") + "/first"
    second = tiny("second", longer, f"run.init_from={there}", "data.sources.stories.documents=70")
    assert train([*second, "run.stop_after_steps=1"]) is Outcome.STOPPED
    assert train(second) is Outcome.FINISHED


def test_a_run_may_start_from_a_stock_hugging_face_folder(tiny, tmp_path):
    """Its weights and, unless the config names another, its tokenizer; another shape is refused."""
    transformers = pytest.importorskip("transformers")
    import torch

    from checkpoints import load_model
    from data import embedded
    from tokenizer import Tokenizer

    stock = tmp_path / "stock"
    shape = dict(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True)  # fmt: skip
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    theirs.save_pretrained(stock)
    Tokenizer.train(list(embedded.documents("stories", "train", 200, 1)), 1024).save(stock)
    ours = ["model.window=null", "model.rope_base_global=10000.0", f"run.init_from={stock}"]
    still = ["optimizer.muon_lr=1e-12", "optimizer.adamw_lr=1e-12"]
    assert train(tiny("stock", SHORT, *ours, *still)) is Outcome.FINISHED
    model, tokenizer, _ = load_model(tmp_path / "runs" / "stock")
    assert tokenizer.fingerprint == Tokenizer.load(stock).fingerprint
    expected = load_model(stock)[0].state_dict()
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in model.state_dict().items())
    with pytest.raises(RunMismatch, match=r"model\.d_ff: 64 there, 96 in the config"):
        train(tiny("other", SHORT, *ours, "model.d_ff=96"))


@pytest.mark.parametrize("named", [False, True])
def test_a_run_may_start_from_a_model_of_the_hub(tiny, tmp_path, monkeypatch, named):
    """Asked for once, whoever names the tokenizer, then taken from the cache; a run that goes on asks for nothing."""
    transformers = pytest.importorskip("transformers")
    import huggingface_hub
    import torch

    from checkpoints import load_model
    from data import embedded
    from tokenizer import Tokenizer

    stock, asked = tmp_path / "stock", []
    shape = dict(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True)  # fmt: skip
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(stock)
    Tokenizer.train(list(embedded.documents("stories", "train", 200, 1)), 1024).save(stock)

    def snapshot_download(name, local_files_only, **_):
        asked.append((name, local_files_only))
        return str(stock)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ours = ["model.window=null", "model.rope_base_global=10000.0", "run.init_from=hub:someone/small",
            "optimizer.muon_lr=1e-12", "optimizer.adamw_lr=1e-12",
            *([f"tokenizer.path={stock}"] if named else [])]  # fmt: skip
    assert train([*tiny("x", SHORT, *ours), "run.stop_after_steps=1"]) is Outcome.STOPPED
    assert set(asked) == {("someone/small", False), ("someone/small", True)}
    assert asked.count(("someone/small", False)) == 1 and asked[0] == ("someone/small", False)
    asked.clear()
    assert train(tiny("x", SHORT, *ours)) is Outcome.FINISHED
    assert asked == []
    model, expected = load_model(tmp_path / "runs" / "x")[0], load_model(stock)[0].state_dict()
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in model.state_dict().items())


def test_the_plan_of_a_vocabulary_that_is_too_small_is_a_config_error(tiny, tmp_path):
    from tokenizer import Tokenizer

    Tokenizer.train(["a b c"], 1024).save(tmp_path / "tokenizer")
    overrides = [f"tokenizer.path={tmp_path / 'tokenizer'}", "model.vocab_size=100"]
    done = warm.run(sys.executable, "multigpu_train.py", *tiny("x", SHORT, *overrides), "--dry-run")
    assert done.returncode == 2 and "model.vocab_size" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "code"), [("OSError(28, 'No space left')", 1), ("KeyboardInterrupt()", 75)])
def test_trouble_with_the_disk_and_ctrl_c_before_training_are_one_line(tiny, error, code):
    program = f"""
import sys, training.start, multigpu_train
def fail(*_): raise {error}
training.start.start = fail
sys.exit(multigpu_train.main())
"""
    command = [sys.executable, "-c", program, *tiny("x", SHORT)]
    done = warm.run(*command)
    assert done.returncode == code
    assert done.stderr.startswith("stopped") and len(done.stderr.splitlines()) == 1
