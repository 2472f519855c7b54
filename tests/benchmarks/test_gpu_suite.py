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
