"""Two processes train what one trains; the wrong number of processes trains nothing.

Real launches through `accelerate launch`, on gloo. Equality is in loss at every step, since sums over ranks are rounded
in another order than sums over micro-batches.
"""

import re
import sys
from pathlib import Path

import pytest

from observe.metrics import MetricsLog

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
       "--dynamo_backend", "no", "--main_process_port", "0", "multigpu_train.py"]  # fmt: skip
ONE = [sys.executable, "multigpu_train.py"]


def losses(arguments: list[str]) -> dict[int, float]:
    """Training loss by step of the run that `arguments` name; each step must be there once."""
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith("run."))
    folder, name = given["run.folder"], given["run.name"]
    records = [r for r in MetricsLog.read(Path(folder) / name / "metrics.jsonl") if r["kind"] == "train"]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records)
    return found


def assert_agree(one: dict[int, float], other: dict[int, float]) -> None:
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-4


@pytest.fixture
def whole(tiny, run) -> dict[int, float]:
    """The losses of one unbroken process."""
    finished = run(*ONE, *tiny("whole"))
    assert finished.returncode == 0, finished.stderr
    return losses(tiny("whole"))


def test_two_processes_equal_one(tiny, run, whole):
    launched = run(*TWO, *tiny("two", "parallel.processes=2"), ACCELERATE_USE_CPU="true")
    assert launched.returncode == 0, launched.stderr
    assert_agree(whole, losses(tiny("two")))


def test_one_then_two_then_one_process_is_one_run(tiny, run, whole):
    """The box changes twice."""
    arguments = tiny("changing")
    assert run(*ONE, *arguments, "run.stop_after_steps=5").returncode == 75
    launched = run(*TWO, *arguments, "run.stop_after_steps=17", ACCELERATE_USE_CPU="true")
    assert "resumed from" in launched.stderr and "at step 5" in launched.stderr
    finished = run(*ONE, *arguments)
    assert finished.returncode == 0 and "at step 17" in finished.stderr, finished.stderr
    assert_agree(whole, losses(arguments))


@pytest.mark.parametrize(
    "launcher",
    [ONE, [*ACCELERATE, "multigpu_train.py"], [*ACCELERATE, "--cpu", "--num_processes", "2", "multigpu_train.py"]],
    ids=["python", "accelerate", "accelerate --cpu, which starts one process whatever it is asked for"],
)
def test_fewer_processes_than_expected_is_an_error(tiny, run, launcher):
    launched = run(*launcher, *tiny("few", "parallel.processes=2"))
    assert launched.returncode != 0
    message = r"1 process started, but parallel.processes is 2: start 2 with `.*--num_processes 2"
    assert re.search(message, launched.stderr)
    assert "--multi_gpu" in launched.stderr


def test_the_accelerate_config_does_not_decide_and_a_clash_is_reported(tiny, run):
    arguments = tiny("clash", "run.stop_after_steps=1")
    launched = run(*ACCELERATE, "--mixed_precision", "bf16", "multigpu_train.py", *arguments)
    assert "ACCELERATE_MIXED_PRECISION=bf16; this run's config decides: parallel.precision=fp32" in launched.stderr
    plain = run(*ONE, *tiny("plain", "run.stop_after_steps=1"))
    assert plain.returncode == 75 and "ACCELERATE" not in plain.stderr
    assert losses(arguments) == losses(tiny("plain"))  # in fp32, as the config says


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
