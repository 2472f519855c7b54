"""The folder that an export becomes says to every client what it needs: what begins a text, where it ends, and what to
expect of the package on a Mac."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from export import Options, bundle
from export.trained import load
from tests.export.checkpoint_of import save_checkpoint

STAND_IN = """
import sys, types
sys.path.insert(0, {root!r})
from export.mil import Package

class MLModel:
    def __init__(self, path, compute_units): self.package = Package(path, compute_units)
    def make_state(self): return self.package.new_state()
    def predict(self, inputs, state=None): return self.package.predict(inputs, state)

coremltools = types.ModuleType("coremltools")
coremltools.models = types.SimpleNamespace(MLModel=MLModel)
coremltools.ComputeUnit = types.SimpleNamespace(CPU_ONLY="fp32", ALL="fp16")
real = sys.modules.get("coremltools")
sys.modules["coremltools"] = coremltools
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint that was taught conversations, and its folder."""
    root = tmp_path_factory.mktemp("exported")
    trained = load(save_checkpoint(root / "run", chats=True))
    bundle.export(trained, "coreml", Options(hub="me/mine"), root / "out")
    return trained, root / "out"


def test_the_tokenizer_begins_and_ends_as_the_model_was_taught(exported):
    trained, folder = exported
    theirs, ours = AutoTokenizer.from_pretrained(folder), trained.tokenizer
    assert theirs("One day").input_ids == [ours.end_of_text, *ours.encode("One day")]
    assert theirs.eos_token == "<|end|>" and "<|end|>" in theirs.all_special_tokens
    talk = [{"role": "user", "content": "What is it?"}]
    assert theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) == (
        "<|user|>What is it?<|end|><|assistant|>"
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ours.token_id("<|end|>"), ours.end_of_text]
    assert generation["bos_token_id"] == ours.end_of_text
    assert ours.token_id("<|reserved_0|>") in generation["suppress_tokens"]
    assert not {ours.token_id("<|end|>"), ours.end_of_text} & set(generation["suppress_tokens"])


def test_the_report_is_complete(exported):
    trained, folder = exported
    report = json.loads((folder / bundle.REPORT).read_text())
    assert report["contract"]["inputs"] == {"inputIds": {"dtype": "int32", "shape": [1, [1, 48]]}}
    assert report["contract"]["states"]["keyCache"]["shape"] == [1, 1, 64, 8]  # 8 and 48 entries, and the position
    assert report["parity"]["graph"]["relative"] < 1e-4 and len(report["not_verified"]) == 4
    assert report["files"]["model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"] == report["weight_bytes"]
    assert report["model"]["parameters"] == trained.config.parameters()["total"] and report["model"]["chats"]


def test_a_model_that_was_taught_no_conversations_ends_texts(tmp_path):
    trained = load(save_checkpoint(tmp_path / "run"))
    assert not trained.chats and trained.end == trained.tokenizer.end_of_text
    bundle._tokenizer(trained, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"


def check_on_mac(folder, *units):
    """Run the folder's own script, with our interpreter in the place of Core ML."""
    code = STAND_IN.format(root=os.getcwd()) + (
        f"import runpy; sys.argv = ['check_on_mac.py', *{units!r}]; "
        f"runpy.run_path({str(folder / 'check_on_mac.py')!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_script_for_a_mac_passes_what_is_right_and_no_more(exported, tmp_path):
    _, folder = exported
    done = check_on_mac(folder, "CPU_ONLY", "ALL")
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert done.returncode == 0, done.stderr
    assert len(rows) == 2 * 7 and all(row[-2:] == ["True", "True"] for row in rows)
    expected = dict(np.load(folder / "golden.npz"))
    expected["story"] = np.roll(expected["story"], 1)
    np.savez_compressed(folder / "golden.npz", **expected)
    assert check_on_mac(folder, "CPU_ONLY").returncode == 1
