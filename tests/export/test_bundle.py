"""The folder that an export becomes says to every client what it needs: what begins a text, where it ends, and what to
expect of the package on a Mac."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from export import Options, bundle
from export.mil import Package
from export.trained import load
from tests.export.checkpoint_of import save_checkpoint


class StandIn:
    """coremltools' MLModel, as the script for a Mac uses it, on our interpreter."""

    def __init__(self, path, compute_units):
        self.package = Package(path, compute_units)

    def make_state(self):
        return self.package.new_state()

    def predict(self, inputs, state=None):
        return self.package.predict(inputs, state)


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
        "<|endoftext|><|user|>What is it?<|end|><|assistant|>"
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


@pytest.fixture
def check_on_mac(exported, monkeypatch, capsys):
    """check_on_mac(units, ...) -> the exit code of the folder's own script, and the table's rows."""
    import coremltools

    monkeypatch.setattr(coremltools.models, "MLModel", StandIn)
    monkeypatch.setattr(coremltools, "ComputeUnit", SimpleNamespace(CPU_ONLY="fp32", ALL="fp16"))

    def check_on_mac(*units):
        monkeypatch.setattr(sys, "argv", ["check_on_mac.py", *units])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(exported[1] / "check_on_mac.py"), run_name="__main__")
        return end.value.code, [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    return check_on_mac


def test_the_script_for_a_mac_passes_what_is_right_and_no_more(exported, check_on_mac):
    _, folder = exported
    code, rows = check_on_mac("CPU_ONLY", "ALL")
    assert code == 0 and len(rows) == 2 * 7
    assert all(row[-2:] == ["True", "True"] for row in rows)
    expected = dict(np.load(folder / "golden.npz"))
    np.savez_compressed(folder / "golden.npz", **(expected | {"story": np.roll(expected["story"], 1)}))
    assert check_on_mac("CPU_ONLY")[0] == 1
