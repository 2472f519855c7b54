"""Two processes train what one trains; the wrong number of processes trains nothing.

Real processes on gloo; `accelerate launch` starts those of one test. Equality is in loss at every step, since sums over
ranks are rounded in another order than sums over micro-batches.
"""

import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import training.start
from data.prepare import Prepared
from models import build_model
from observe.metrics import MetricsLog
from settings import read, validate
from tests import warm
from tests.conftest import ROOT
from tests.training.sharded_start import CONFIG
from tokenizer import Tokenizer
from training.settings import RunConfig
from training.trainer import Outcome

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
       "--dynamo_backend", "no", "--main_process_port", "0", "multigpu_train.py"]  # fmt: skip
ONE = [sys.executable, "multigpu_train.py"]


def losses(run: list[str] | Path) -> dict[int, float]:
    """Training loss by step of the run in that folder, or that such arguments name; each step must be there once."""
    if isinstance(run, list):
        given = dict(argument.split("=", 1) for argument in run if argument.startswith("run."))
        run = Path(given["run.folder"]) / given["run.name"]
    records = [r for r in MetricsLog.read(run / "metrics.jsonl") if r["kind"] == "train"]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records)
    return found


def assert_agree(one: dict[int, float], other: dict[int, float]) -> None:
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-4


def train_alone(arguments: list[str]) -> dict[int, float]:
    """The losses of one process, which is this one."""
    assert training.start.start(validate(RunConfig, read(arguments[1], arguments[2:]))) is Outcome.FINISHED
    return losses(arguments)


def test_two_processes_equal_one(tiny, whole):
    launched = warm.ranks(2, *ONE, *tiny("two", "parallel.processes=2"))
    assert [code for code, _ in launched] == [0, 0], launched
    assert_agree(losses(whole), losses(tiny("two")))


def test_one_then_two_then_one_process_is_one_run_whatever_accelerate_is_configured_for(tiny, run, whole, tmp_path):
    """The box changes twice. In fp32, as the run's config says; a clash is reported."""
    arguments = tiny("changing")
    in_bf16 = ["bf16" if TWO[place - 1] == "--mixed_precision" else part for place, part in enumerate(TWO)]
    assert warm.run(*ONE, *arguments, "run.stop_after_steps=5").returncode == 75
    launched = run(*in_bf16, *arguments, "run.stop_after_steps=17", ACCELERATE_USE_CPU="true")
    outcome = json.loads((tmp_path / "runs" / "changing" / "outcome.json").read_text())
    assert launched.returncode == 1  # the launcher's own, whatever the processes say
    assert (outcome["code"], outcome["reason"], outcome["step"]) == (75, "run.stop_after_steps", 17)
    assert "resumed from" in launched.stderr and "at step 5" in launched.stderr
    assert "ACCELERATE_MIXED_PRECISION=bf16; this run's config decides: parallel.precision=fp32" in launched.stderr
    finished = warm.run(*ONE, *arguments)
    assert finished.returncode == 0 and "at step 17" in finished.stderr, finished.stderr
    assert "ACCELERATE" not in finished.stderr
    assert_agree(losses(whole), losses(arguments))


def test_machines_without_a_common_disk_prepare_for_themselves_but_do_not_resume_apart(whole, tmp_path):
    """A process that does not see the checkpoint would begin anew beside those that go on."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        machine.mkdir()
    command = [sys.executable, ROOT / "multigpu_train.py", "--config", ROOT / "tests" / "tiny.yaml", "run.name=apart"]
    ended = warm.ranks(2, *command, "run.stop_after_steps=6", cwd=machines)
    assert [code for code, _ in ended] == [75, 75], ended
    assert all(list(machine.glob("shards/stories-*/dataset.json")) for machine in machines)
    assert not (machines[1] / "runs").exists()
    expected = losses(whole)
    assert_agree({step: expected[step] for step in range(1, 7)}, losses(machines[0] / "runs" / "apart"))
    ended = warm.ranks(2, *command, cwd=machines)
    assert [code for code, _ in ended] == [2, 2]
    assert "1 of 2 processes do not see runs/apart/checkpoints/step-00000006" in ended[0][1]


def test_only_the_first_process_of_a_machine_reads_the_corpus(tmp_path, monkeypatch):
    """The others take what it has verified."""
    prepared = Prepared(Tokenizer.train(["a b c"], 1024), {"stories": tmp_path, "unused": tmp_path})
    monkeypatch.setattr(training.start, "prepare", lambda *_: pytest.fail("it was prepared again"))
    neighbour = SimpleNamespace(
        is_main=False, is_first_of_machine=False, rank=1, sum=lambda *flags, patiently: list(flags),
        from_main=lambda _: prepared,
    )  # fmt: skip
    config = SimpleNamespace(phases=[SimpleNamespace(data={"stories": 1.0})])
    with contextlib.ExitStack() as held:
        found = training.start._prepare(config, neighbour, SimpleNamespace(stop=False), held)
    assert found.tokenizer is prepared.tokenizer and found.sources == {"stories": tmp_path}


def test_two_processes_drop_what_one_drops(tiny):
    """Dropout's masks follow the sample, not the rank or the micro-batch."""
    dropout = ["model.dropout=0.2", "phases.0.tokens=4096", "phases.1.tokens=2048", "phases.2.tokens=2048"]
    launched = warm.ranks(2, *ONE, *tiny("two", *dropout))
    assert [code for code, _ in launched] == [0, 0], launched
    assert_agree(train_alone(tiny("one", *dropout)), losses(tiny("two")))


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_ranks_draw_together_what_one_process_draws(tmp_path, ranks):
    """Each rank only its own rows, bit for bit, whether or not the rows divide by the ranks."""
    command = [sys.executable, "tests/training/sharded_start.py", tmp_path / "whole.safetensors"]
    launched = warm.ranks(ranks, *command, PYTHONPATH=".")
    assert [code for code, _ in launched] == [0] * ranks, launched
    found = load_file(tmp_path / "whole.safetensors")
    expected = build_model(CONFIG, seed=7).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "launcher",
    [ONE, [*ACCELERATE, "--cpu", "--num_processes", "2", "multigpu_train.py"]],
    ids=["python", "accelerate --cpu, which starts one process whatever it is asked for"],
)
def test_fewer_processes_than_expected_is_an_error(tiny, launcher):
    launched = warm.run(*launcher, *tiny("few", "parallel.processes=2"))
    assert launched.returncode != 0
    message = r"1 process started, but parallel.processes is 2: start 2 with `.*--num_processes 2"
    assert re.search(message, launched.stderr)
    assert "--multi_gpu" in launched.stderr


@pytest.mark.campaign
def test_two_processes_equal_one_over_300_steps_of_real_text(tmp_path, run, real_data):
    """fp32 with fp32 Newton-Schulz, the recipe's own model, smaller batches: agreement at every step."""
    sources = [
        f"data.sources.{name}.{key}=jsonl:{real_data / name / file}.jsonl"
        for name in ("tinystories", "textbooks")
        for key, file in (("from", "train"), ("valid_from", "valid"))
    ]
    sizes = [f"phases.{i}.{key}" for i in range(3) for key in ("tokens=204800", "batch_tokens=2048")]
    quiet = ["parallel.device=cpu", "parallel.precision=fp32", "parallel.cpu_threads=1", "optimizer.newton_schulz=fp32",
             "watch.log_every=1", "watch.wandb=off", "evaluation.every_steps=null", "evaluation.final_tokens=4096",
             "evaluation.bigram_floor=false"]  # fmt: skip
    folders = [f"run.folder={tmp_path / 'runs'}", f"data.shards={tmp_path / 'shards'}"]
    common = ["--config", "configs/tinystories-cpu.yaml", *folders, *sources, *sizes, *quiet]
    for command, name in ((ONE, "one"), (TWO, "two")):
        finished = run(*command, *common, f"run.name={name}", timeout=3600, ACCELERATE_USE_CPU="true")
        assert finished.returncode == 0, finished.stderr
    one, two = (losses([*common, f"run.name={name}"]) for name in ("one", "two"))
    assert len(one) == 300
    assert_agree(one, two)
