"""Two commits' runs are compared in every bit: equal where the code is, and one bit is enough to tell."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import result, same_bits
from observe.metrics import MetricsLog


@pytest.mark.campaign
def test_a_commit_trains_as_itself_and_goes_on_from_the_others_checkpoint(run, tmp_path):
    if subprocess.run(["git", "-C", result.ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("this is no git repository, so that there is no other commit")
    command = ["-m", "benchmarks.same_bits", "HEAD", "--steps", "4", "--config", "tests/tiny.yaml"]
    finished = run(sys.executable, *command, "--json", tmp_path / "same.json")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "same.json").read_text())
    rows = [(row["run"], row["compared"], row["differ"]) for row in found["rows"]]
    assert rows == [
        ("here", "checkpoint of step 2", 0),
        ("here", "losses of steps 1 to 4", 0), ("here", "checkpoint of step 4", 0),
        ("there, then here", "losses of steps 3 to 4", 0), ("there, then here", "checkpoint of step 4", 0),
        ("here, then there", "losses of steps 3 to 4", 0), ("here, then there", "checkpoint of step 4", 0),
    ]  # fmt: skip
    assert [row["values"] for row in found["rows"][1::2]] == [4, 2, 2] and len(found["compared_with"]) == 40


def test_one_bit_and_one_step_are_enough_to_tell(tmp_path):
    """Even where the numbers are equal: 0 and -0, nothing and one more."""
    tensors = {"same": torch.ones(2), "sign": torch.tensor(0.0), "number": torch.tensor([float("nan")])}
    changes = {"one": {}, "sign": {"sign": torch.tensor(-0.0)}, "more": {"extra": torch.ones(1)},
               "type": {"same": torch.ones(2, dtype=torch.float64)}}  # fmt: skip
    for name, change in changes.items():
        last = tmp_path / name / "checkpoints" / "step-00000004"
        last.mkdir(parents=True)
        save_file({**tensors, **change}, last / "model.safetensors")
        save_file({"momentum": torch.ones(3)}, last / "optimizer.safetensors")
        log = MetricsLog(tmp_path / name / "metrics.jsonl")
        for step in range(1, 5 + (name == "more")):
            log.append({"kind": "train", "step": step, "loss": 3.0 + (name == "sign" and step == 4) * 1e-15})
    one = tmp_path / "one"
    assert same_bits._same_tensors(one, one, 4) == {"tensors": 4, "values": 7, "differ": 0, "holds": True}
    for name, key in (("sign", "sign"), ("more", "extra"), ("type", "same")):
        found = same_bits._same_tensors(one, tmp_path / name, 4)
        assert not found["holds"] and found["differ"] == 1 and found["first"] == f"model: {key}"
    assert same_bits._same_losses(one, one, 1)["holds"]
    for name, first in (("sign", "step 4"), ("more", "step 5")):
        found = same_bits._same_losses(one, tmp_path / name, 3)
        assert not found["holds"] and found["first"] == first


def test_an_unknown_commit_is_said_in_one_line(run):
    finished = run(sys.executable, "-m", "benchmarks.same_bits", "no-such-commit")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and "no-such-commit" in finished.stderr
