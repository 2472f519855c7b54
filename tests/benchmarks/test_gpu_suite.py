"""The one-command GPU suite runs anywhere: small on a CPU, saying what it skipped."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_kernels, gpu_speed, gpu_suite, gpu_trainer
from benchmarks.device import Findings, at_most
from observe.metrics import MetricsLog
from tests import warm

CPU = torch.device("cpu")
WORTH = ["attention", "decode", "checkpoint", "training"]


def test_suite_runs_holds_and_says_what_it_skipped(tmp_path):
    """In order of worth; the other sections have tests of their own."""
    file = tmp_path / "out" / "suite.json"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--minutes", "9", "--json", file]
    finished = warm.run(*command, "--only", *reversed(WORTH))
    assert finished.returncode == 0, finished.stderr
    result = json.loads(file.read_text())
    assert list(result["rows"]) == list(result["seconds"]) == WORTH and result["whole"]
    assert all(row["holds"] for rows in result["rows"].values() for row in rows)
    assert result["command"].startswith("python -m benchmarks.gpu_suite") and result["environment"]["torch"]
    assert all(reason in finished.stdout for reason in result["skipped"])
    assert all("CUDA" in reason or "CPU" in reason or "card" in reason for reason in result["skipped"])


def test_the_minutes_are_spent_in_order_of_worth_and_what_came_before_their_end_counts(tmp_path):
    """What needs more than is left is not begun, what fits is; what takes longer is cut, and its rows are written."""
    file = tmp_path / "suite.json"
    findings = Findings(CPU, 30, lambda findings: gpu_suite.write(findings, file))

    def quick(findings):
        findings.add({"row": len(findings.rows), "holds": True})

    def endless(findings):
        findings.add({"row": "before", "holds": True})
        assert json.loads(file.read_text())["rows"]["endless"] == [{"row": "before", "holds": True}]
        findings._end = 0
        with at_most(0.05, "the rest", findings), findings.measuring(row="after"):
            time.sleep(20)

    table = (("large", quick, 60), ("small", quick, 5), ("endless", endless, 5), ("late", quick, 5))
    for name, measure, seconds in table:
        gpu_suite.run(gpu_suite.Section(name, measure, {"cpu": seconds}), findings)
    result = json.loads(file.read_text())
    assert list(result["rows"]) == list(result["seconds"]) == ["small", "endless"] and not result["whole"]
    assert [reason.split(":")[0] for reason in result["skipped"]] == ["section large", "the rest", "section late"]
    assert gpu_suite.holds(findings) and not gpu_suite.holds(Findings(CPU, 0))


def test_one_limit_may_lie_in_another():
    findings = Findings(CPU)
    with at_most(0.2, "outer", findings):
        with at_most(0.05, "inner", findings):
            time.sleep(20)
        with at_most(100, "long", findings):
            pass
        time.sleep(20)
    assert [reason.split(":")[0] for reason in findings.skipped] == ["inner", "outer"]


def test_a_section_that_fails_does_not_hold_and_leaves_the_others_their_turn():
    def failing(findings):
        raise ImportError("no such library")

    findings = Findings(CPU)
    gpu_suite.run(gpu_suite.Section("failing", failing, {"cpu": 0}), findings)
    assert "no such library" in findings.rows["failing"][0]["error"] and not gpu_suite.holds(findings)


def measured(section):
    """The rows of one section, on the CPU."""
    findings = Findings(CPU)
    with findings.section("x"):
        section(findings)
    return findings.rows.get("x", []), findings.skipped


@pytest.mark.parametrize("fault", ["values", "documents", "causality"])
def test_a_broken_kernel_fails_the_suite(monkeypatch, fault):
    exact = gpu_kernels.attention

    def broken(query, key, value, window, mask):
        if fault == "values":
            return exact(query, key, value, window, mask) * 1.001
        if fault == "causality":
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return exact(query, key, value, window, gpu_kernels.Layout.of(None, query.shape[2], CPU).mask(window))

    monkeypatch.setattr(gpu_kernels, "attention", broken)
    rows, _ = measured(gpu_kernels.attention_rows)
    assert rows and not any(row["holds"] for row in rows)
    assert all((row["leak"] > 0) == (fault != "values") for row in rows)


def test_a_broken_cache_fails_the_suite(monkeypatch):
    """A step that looks at what is padding, or not there yet."""
    from models import transformer

    exact = transformer.attend_to_cache
    monkeypatch.setattr(transformer, "attend_to_cache", lambda query, key, value, _: exact(query, key, value, None))
    monkeypatch.setattr(gpu_kernels, "MODELS", {"as Qwen3": gpu_kernels.MODELS["as Qwen3"]})
    ((row,), _) = measured(gpu_kernels.decode_rows)
    assert not row["holds"] and row["full"] < 1e-4 and row["packed"] < 1e-4
    assert min(row["cached"], row["padded"], row["text"]) > 0.01


def test_a_run_is_killed_stopped_resumed_and_equal_to_the_unbroken_one(monkeypatch):
    """The launcher, whose start takes longer than this run, is left out."""
    monkeypatch.setattr(gpu_trainer, "LAUNCH", ())
    monkeypatch.setattr(gpu_trainer, "subprocess", SimpleNamespace(Popen=warm.Popen))
    rows, _ = measured(gpu_trainer.run_kill_resume)
    killed, stopped, _, beside, _ = rows
    assert all(row["holds"] for row in rows)
    assert (killed["what"], stopped["what"]) == ("SIGKILL", "SIGTERM")
    assert beside["what"] == f"resumed at {killed['saved']} and {stopped['saved']}, beside unbroken"
    assert beside["apart"] == beside["tensors_that_differ"] == 0


@pytest.mark.parametrize(
    ("fault", "holds"), [(None, True), ("bit", False), ("loss", False), ("step", False), ("resumed once", False)]
)
def test_a_broken_run_is_compared_with_the_unbroken_one(tmp_path, monkeypatch, fault, holds):
    from safetensors.torch import save_file

    monkeypatch.setitem(gpu_trainer.SHAPES["cpu"], "steps", 9)
    runs = [gpu_trainer.Launched(tmp_path, name, CPU) for name in ("unbroken", "broken")]
    for run in runs:
        log, broken = MetricsLog(run.path / "metrics.jsonl"), run.name == "broken"
        for step in range(1, 10):
            if broken and step in ((4, 7) if fault != "resumed once" else (4,)):
                log.append({"kind": "event", "event": "resumed", "step": step - 1})
            if not (broken and fault == "step" and step == 5):
                off = 1e-9 if broken and fault == "loss" and step == 8 else 0.0
                log.append({"kind": "train", "step": step, "loss": 5.0 + off})
        last = run.path / "checkpoints" / "step-00000009"
        last.mkdir(parents=True)
        save_file({"weight": torch.ones(3)}, last / "model.safetensors")
        moment = torch.tensor([1.0, 1.0 + (broken and fault == "bit") * 2e-7])
        save_file({"weight.momentum": moment}, last / "optimizer.safetensors")
    assert gpu_trainer.compared(*runs)["holds"] == holds


def test_what_fails_or_does_not_fit_leaves_the_others_their_turn(monkeypatch):
    fits = [0]  # rows of a micro-batch

    def training_row(_device, name, _config, _settings, micro_batch, _compiled):
        if not fits:
            raise RuntimeError("no kernel image")
        if micro_batch > fits[0]:
            raise torch.OutOfMemoryError("out of memory")
        return {"model": name, "micro_batch": micro_batch, "holds": True}

    monkeypatch.setattr(gpu_speed, "training_row", training_row)
    rows, skipped = measured(gpu_speed.training_rows)
    assert rows == [] and "model tiny, compile False: does not fit this card" in skipped
    fits[0] = 3
    assert measured(gpu_speed.training_rows)[0][0]["micro_batch"] == 2
    fits.clear()
    ((failed,), _) = measured(gpu_speed.training_rows)
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
    findings = Findings(CPU)
    with at_most(0.05, "a compiler", findings):
        try:
            time.sleep(20)
        except Exception:  # noqa: BLE001  as whoever is interrupted may do
            raise AssertionError from None
    assert findings.skipped == ["a compiler: not done in the 0 s that were left"]
