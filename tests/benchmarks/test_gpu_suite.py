"""The one-command GPU suite runs anywhere: small on a CPU, saying what it skipped."""

import json
import sys


def test_suite_runs_holds_and_says_what_it_skipped(run, tmp_path):
    finished = run(sys.executable, "-m", "benchmarks.gpu_suite", "--json", tmp_path / "out" / "suite.json")
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "out" / "suite.json").read_text())
    rows = [row for section in result["rows"].values() for row in section]
    assert set(result["rows"]) == {"attention", "training", "checkpoint"} and all(row["holds"] for row in rows)
    assert result["command"].startswith("python -m benchmarks.gpu_suite") and result["environment"]["torch"]
    assert result["skipped"] and all(reason in finished.stdout for reason in result["skipped"])


def test_a_broken_kernel_fails_the_suite(monkeypatch):
    import torch

    from benchmarks import gpu_suite

    exact = gpu_suite.attention
    monkeypatch.setattr(gpu_suite, "attention", lambda q, k, v, window, mask: exact(q, k, v, window, mask) * 1.001)
    rows = gpu_suite.attention_rows(torch.device("cpu"), [])
    assert rows and not any(row["holds"] for row in rows)


def test_what_fails_or_does_not_fit_leaves_the_others_their_turn(monkeypatch):
    import torch

    from benchmarks import gpu_suite

    fits = [0]  # rows of a micro-batch

    def training_row(_device, name, _config, _settings, micro_batch, _compiled):
        if not fits:
            raise RuntimeError("no kernel image")
        if micro_batch > fits[0]:
            raise torch.OutOfMemoryError("out of memory")
        return {"model": name, "micro_batch": micro_batch, "holds": True}

    monkeypatch.setattr(gpu_suite, "training_row", training_row)
    skipped = []
    assert gpu_suite.training_rows(torch.device("cpu"), [], skipped) == []
    assert "model tiny, compile False: does not fit this card" in skipped
    fits[0] = 3
    assert gpu_suite.training_rows(torch.device("cpu"), [], [])[0]["micro_batch"] == 2
    fits.clear()
    (failed,) = gpu_suite.training_rows(torch.device("cpu"), [], [])
    assert not failed["holds"] and "no kernel image" in failed["error"]


def test_the_teachers_section_needs_nothing_but_torch(run, tmp_path):
    """Its Python on a rented card may have nothing else."""
    program = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("yaml", "pydantic", "safetensors", "tokenizers", "transformers", "datasets",
                                  "huggingface_hub", "accelerate", "httpx", "pyarrow", "numpy"):
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Nothing())
runpy.run_module("benchmarks.gpu_suite", run_name="__main__")
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py", "--only", "teacher", "--json", tmp_path / "suite.json"]
    finished = run(*command, PYTHONPATH=".")
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "suite.json").read_text())
    assert set(result["rows"]) == {"teacher"}
    assert [(row["batch"], row["steps"], row["ids"]) for row in result["rows"]["teacher"]] == [
        (2, "plain", "equal"), (3, "plain", "equal")]  # fmt: skip
    assert any("CUDA graphs" in reason for reason in result["skipped"])


def test_the_teacher_is_measured_by_graphs_too(monkeypatch):
    """With a recording that is the recorded function itself. One that is wrong from its second token on does not
    hold."""
    import torch

    from benchmarks import gpu_teacher
    from models.inference import captured
    from models.inference.ready import for_decoding

    monkeypatch.setattr(captured, "available", lambda _device: True)
    monkeypatch.setattr(gpu_teacher, "CHECKED", 30)
    device = torch.device("cpu")
    model = for_decoding(gpu_teacher.random_model(gpu_teacher.TINY, device), "bf16")

    def measured(record):
        monkeypatch.setattr(captured, "as_cuda_graph", record)
        return gpu_teacher.teacher_row(device, model, 3, "graphs")

    right = measured(lambda step: step)
    assert right["holds"] and right["graph_error"] < 0.05 and "fallback" not in right

    def stale(step):
        out = step().clone()
        return lambda: out

    wrong = measured(stale)
    assert not wrong["holds"] and wrong["graph_error"] > 0.5

    def refused(step):
        raise RuntimeError("no graphs here")

    assert "no graphs here" in measured(refused)["fallback"]


def test_qwen3_4bs_shape_has_its_parameters():
    from benchmarks import gpu_teacher

    assert gpu_teacher.QWEN3_4B.parameters()["total"] == 4_022_468_096


def test_what_takes_too_long_is_ended_and_told():
    import time

    from benchmarks.gpu_teacher import _at_most

    skipped = []
    with _at_most(0.05, "a compiler", skipped):
        try:
            time.sleep(20)
        except Exception:  # noqa: BLE001  as whoever is interrupted may do
            raise AssertionError from None
    assert skipped == ["a compiler: not done in the 0 s that were left"]
