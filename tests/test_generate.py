"""generate.py: wrong arguments are named, with exit code 2, and a closed pipe is no error to talk about."""

import subprocess
import sys

import pytest

import checkpoints
from checkpoints import checkpoint
from models import ModelConfig, build_model
from tests.conftest import ROOT
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(["the quick brown fox"], 1024)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, context=64, n_layers=1, d_model=16, n_heads=2, d_ff=16)
    weights = {name: tensor.contiguous() for name, tensor in build_model(shape).state_dict().items()}
    checkpoint.save(
        folder / "checkpoints", checkpoints.RunState(seed=1), model=weights, optimizer={}, model_config=shape,
        run_config={}, tokenizer=tokenizer
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [(["--device", "banana", "a"], "--device banana"),
     (["--device", "meta", "a"], "--device meta"), (["--seed", str(2**70), "a"], "--seed"),
     ([b"\xff"], "not UTF-8"), (["--temperature", "1e-40", "a"], "--temperature"),
     (["--temperature", "nan", "a"], "--temperature"), (["--stop", "two words", "a"], "--stop"),
     (["word " * 100], "context of 64")],
)  # fmt: skip
def test_wrong_arguments(run_folder, arguments, remedy):
    command = [sys.executable, "generate.py", "--checkpoint", run_folder, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert remedy in done.stderr and "Traceback" not in done.stderr


def test_whoever_closes_the_pipe_has_seen_enough(run_folder):
    command = [sys.executable, "generate.py", "--checkpoint", run_folder, "--max-new-tokens", "60", "the"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_smaller_weights_write_as_well(run_folder, weights):
    command = [sys.executable, "generate.py", "--checkpoint", run_folder, "--weights", weights, "--max-new-tokens", "5"]
    done = subprocess.run([*command, "the quick"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("the quick"), done.stderr


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(tmp_path):
    """Of a model that knows nothing, whose vocabulary was made a multiple of 64."""
    tokenizer = Tokenizer.train(["the quick brown fox"], 1024)
    shape = ModelConfig(vocab_size=8192, context=256, n_layers=1, d_model=16, n_heads=2, d_ff=16)
    weights = {name: tensor.contiguous() for name, tensor in build_model(shape).state_dict().items()}
    checkpoint.save(
        tmp_path / "checkpoints", checkpoints.RunState(seed=1), model=weights, optimizer={}, model_config=shape,
        run_config={}, tokenizer=tokenizer
    )  # fmt: skip
    command = [sys.executable, "generate.py", "--checkpoint", tmp_path, "--max-new-tokens", "100", "the", "quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
