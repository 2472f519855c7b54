"""The CPU benchmarks measure what they say, on tables small enough for a test. Their figures are no test's business."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import attention_scaling, data_preparation, decode, result, train_throughput, tutoring
from data import sources


@pytest.mark.parametrize("side", train_throughput.SIDES)
def test_every_side_trains(side):
    measured = train_throughput.measure(side, "helium-13m", batch=1, context=16, steps=1, precision="fp32")
    assert measured["rate"] > 0
    assert measured["first_loss"] == pytest.approx(10.4, abs=0.3)
    assert measured["last_loss"] < measured["first_loss"]


@pytest.mark.parametrize("side", decode.SIDES)
def test_every_side_writes(side):
    assert decode.measure(side, "helium-13m", tokens=5)["tokens_per_second"] > 0


@pytest.mark.parametrize("windowed", [True, False])
def test_attention_is_measured_forward_and_backward(windowed):
    measured = attention_scaling.measure("helium-13m", length=512, windowed=windowed, memory="returned")
    assert measured["seconds_per_token"] > 0 and measured["memory"] >= 0


def test_a_measurement_has_a_process_of_its_own():
    """One thread, its own peak memory, its errors told."""
    found = result.isolated(decode.measure, side="fp32", recipe="helium-13m", tokens=3)
    assert 100e6 < found["peak_memory"] < 2e9 and found["tokens_per_second"] > 0
    with pytest.raises(RuntimeError, match="no-such-recipe"):
        result.isolated(decode.measure, side="fp32", recipe="no-such-recipe", tokens=3)


@pytest.mark.campaign
def test_every_side_of_a_benchmark_reaches_its_file(run, tmp_path):
    command = [sys.executable, "-m", "benchmarks.decode", "--tokens", "4", "6", "--repeats", "1", "--most-theirs", "4"]
    finished = run(*command, "--json", tmp_path / "decode.json")
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["tokens"], row["side"]) for row in rows] == [
        *((4, side) for side in decode.SIDES), *((6, side) for side in decode.OURS)
    ]  # fmt: skip
    assert all(row["times_transformers"] for row in rows[:5])


@pytest.mark.parametrize(
    ("change", "broken"),
    [({}, None), ({"held_out": 0.52}, "held-out wordings"), ({"neighbours": 0.84}, "neighbours were known"),
     ({"controls": 0.84}, "controls were known"), ({"embedded:stories": 2.12}, "perplexity of embedded:stories"),
     ({"p": 0.02}, "held-out wordings"), ({"known": 0.4}, "were known")],
)  # fmt: skip
def test_tutoring_holds_only_if_every_claim_does(change, broken):
    after = {"trained": 1.0, "held_out": 0.6, "neighbours": 0.86, "controls": 0.86, "embedded:stories": 2.05,
             "embedded:problems": 1.3, "p": 0.001, **change}  # fmt: skip
    before = {"trained": 0.0, "held_out": 0.05, "neighbours": change.get("known", 0.9),
              "controls": 0.9, "embedded:stories": 2.3, "embedded:problems": 1.3}  # fmt: skip

    def sets(state):
        told = {"total": 9, "low": 0.0, "high": 1.0, "log_probability": -1.0}
        return {name: {**told, "accuracy": state[name]} for name in ("trained", "held_out", "neighbours", "controls")}

    def texts(state):
        return {source: {"perplexity": state[source]} for source in tutoring.REPLAY}

    pairs = {name: {"p": after["p"]} for name in sets(after)}
    start = {**before, "embedded:stories": 2.0}
    found = {"sets": sets(after), "replay": texts(after), "start": texts(start),
             "baseline": {"sets": sets(before), "replay": texts(before), "compared": pairs}}  # fmt: skip
    failed = [claim for claim, holds in tutoring.held(found).items() if not holds]
    assert len(failed) == (broken is not None) and all(broken in claim for claim in failed)


def test_a_folder_and_its_one_file_hold_the_same_stories(tmp_path, monkeypatch):
    took = []

    def measured(command: list[str]) -> dict[str, float]:
        (source,) = yaml.safe_load(Path(command[-1]).read_text())["data"]["sources"].values()
        took.append(list(sources.documents(source["from"])))
        return {"seconds": 2.0 if source["from"].startswith("text:") else 1.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(data_preparation, "measured", measured)
    (tmp_path / "tokenizer").touch()
    row = data_preparation._files_beside_one(tmp_path, data_preparation._stories(None, 30), 20, repeats=2)
    assert (row["files"], row["seconds"], row["seconds_of_one_file"], row["times_one_file"]) == (20, 2.0, 1.0, 2.0)
    assert len(took) == 4 and len(took[0]) == 20 and all(other == took[0] for other in took)


@pytest.mark.parametrize("kind", data_preparation.RUNS)
def test_a_tokenizer_is_trained_on_a_run_without_a_break(kind, monkeypatch):
    from tokenizer import Tokenizer

    seen = []
    monkeypatch.setattr(Tokenizer, "train", lambda texts, entries: seen.extend(texts))
    assert data_preparation.train_on_run(kind, 25, None)["seconds"] >= 0
    run = seen[-1]
    assert len(run.encode()) == pytest.approx(25_000, abs=4) and run.split() == [run]
    assert set(run) <= set(data_preparation.RUNS[kind])
