"""A run that was stopped and started again is the run that was never stopped, to the last bit."""

import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from observe.metrics import MetricsLog
from settings import read, validate
from storage import folder
from tests import warm
from tests.conftest import small_run
from training.settings import RunConfig
from training.stability import StepLog
from training.start import RunMismatch, start
from training.trainer import Outcome

STEPS = {"short": 8, "middle": 10, "long": 8}


def train(arguments: list[str]) -> tuple[Outcome, Path]:
    """Run in this process; returns how it ended and the run's folder."""
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    return start(config), config.run.path


@pytest.fixture(scope="module")
def stopped_anywhere(tmp_path_factory, prepared) -> Callable[..., Path]:
    """stopped_anywhere(steps, *overrides): the small run, stopped after so many steps, made once. Not to be changed."""

    @functools.cache
    def stopped_anywhere(steps: int, *overrides: str) -> Path:
        arguments = small_run(tmp_path_factory.mktemp("stopped"), prepared, "run", *overrides)
        outcome, run = train([*arguments, f"run.stop_after_steps={steps}"])
        assert outcome is Outcome.STOPPED
        return run

    return stopped_anywhere


@pytest.fixture
def stopped(stopped_anywhere, tmp_path) -> Callable[..., Path]:
    """stopped(steps, *overrides): a copy of it as this test's run `run`."""
    return lambda *given: shutil.copytree(stopped_anywhere(*given), tmp_path / "runs" / "run")


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the run's last checkpoint."""
    last = run / "checkpoints" / f"step-{sum(STEPS.values()):08d}"
    weights, optimizer = load_file(last / "model.safetensors"), load_file(last / "optimizer.safetensors")
    return weights | {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}


def losses(run: Path) -> list[tuple[int, float]]:
    records = MetricsLog.read(run / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def assert_same_run(one: Path, other: Path) -> None:
    expected, found = final_tensors(one), final_tensors(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(one) == losses(other)
    assert [step for step, _ in losses(one)] == list(range(1, sum(STEPS.values()) + 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_stopped_in_each_phase_and_at_its_edge_equals_unbroken(tiny, whole, seed):
    draw = random.Random(seed)
    first, second, third = STEPS.values()
    stops = [draw.randint(1, first - 1), first, first + draw.randint(1, second - 1), first + second,
             first + second + draw.randint(1, third - 1)]  # fmt: skip
    for stop in stops:
        outcome, broken = train(tiny("broken", f"run.stop_after_steps={stop}"))
        assert outcome is Outcome.STOPPED
    assert train(tiny("broken"))[0] is Outcome.FINISHED
    assert_same_run(whole, broken)


def test_what_an_older_version_saved_is_resumed_as_if_it_had_recorded_everything(tiny, tmp_path):
    """Its state and its shards tell nothing of special tokens, its tokenizer nothing of what begins a text."""
    only = ["phases=[{name: short, context: 64, data: {stories: 1}, tokens: 8192, batch_tokens: 1024}]",
            f"data.shards={tmp_path / 'shards'}"]  # fmt: skip
    _, whole = train(tiny("whole", *only))
    _, broken = train(tiny("broken", *only, "run.stop_after_steps=5"))
    (shards_,) = (path for path in (tmp_path / "shards").glob("stories-*") if path.is_dir())
    for path in (broken / "checkpoints" / "step-00000005", shards_):
        with folder.write(tmp_path / "old") as old:
            for file in (file for file in path.rglob("*") if file.is_file() and file.name != folder.MANIFEST):
                target = old / file.relative_to(path)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read_bytes())
                if file.suffix == ".json":
                    told = json.loads(file.read_text())
                    found = [told.pop(key) for key in ("special_tokens", "bos_token") if key in told]
                    found += [told.update(post_processor=None)] if told.get("post_processor") else []
                    assert found or file.name == "model.json"
                    target.write_text(json.dumps(told))
        folder.remove(path)
        (tmp_path / "old").rename(path)
    assert train(tiny("broken", *only))[0] is Outcome.FINISHED
    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS["short"]
    one, other = (run / "checkpoints" / "step-00000008" / "state.json" for run in (whole, broken))
    assert json.loads(other.read_text())["special_tokens"] == json.loads(one.read_text())["special_tokens"] == [0]


def test_killed_without_warning_and_restarted_equals_unbroken(tiny, whole, tmp_path):
    """SIGKILL at moments that nobody chose: between steps, in a save, in a validation, in preparation."""
    command = [sys.executable, "multigpu_train.py", *tiny("killed", f"data.shards={tmp_path / 'shards'}")]
    draw = random.Random(7)
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    for steps in (None, 1, 6, 12, 20):  # None: while it prepares
        process = warm.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((tmp_path / "shards").exists() if steps is None else
                   metrics.exists() and metrics.read_text().count('"kind":"train"') >= steps):  # fmt: skip
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert warm.run(*command).returncode == 0
    assert_same_run(whole, tmp_path / "runs" / "killed")


def test_sigterm_saves_and_says_how_to_go_on(tiny):
    arguments = tiny("asked", "checkpoint.every_steps=null", "phases.0.tokens=1000000", "phases.0.batch_tokens=1024")
    command = [sys.executable, "multigpu_train.py", *arguments]
    process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = Path(next(argument for argument in arguments if argument.startswith("run.folder="))[11:]) / "asked"
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"kind":"train"' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == Outcome.STOPPED.value
    assert "the same command goes on from there" in output
    saved = sorted((folder / "checkpoints").iterdir())
    assert len(saved) == 1
    state = json.loads((saved[0] / "state.json").read_text())
    assert state["step"] == losses(folder)[-1][0] > 0


def test_damaged_newest_checkpoint_is_skipped_and_named(tiny, whole, stopped, capfd):
    broken = stopped(11)
    weights = broken / "checkpoints" / "step-00000011" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    assert train(tiny("run"))[0] is Outcome.FINISHED
    shown = capfd.readouterr()
    assert f"skipped {weights.parent}" in shown.err + shown.out and "sha256 differs" in shown.err + shown.out
    assert_same_run(whole, broken)


def test_finished_run_is_not_trained_again(tiny, whole, tmp_path):
    again = shutil.copytree(whole, tmp_path / "runs" / "whole")
    assert train(tiny("whole")) == (Outcome.FINISHED, again)
    assert_same_run(whole, again)


def test_another_model_or_seed_under_the_same_name_is_refused(tiny, stopped):
    stopped(3)
    with pytest.raises(RunMismatch, match=r"(?s)model\.d_ff: 64 there, 96 in the config.*run\.seed: 1234 there, 5"):
        train(tiny("run", "model.d_ff=96", "run.seed=5"))


@pytest.mark.parametrize(
    ("stopped_after", "changes", "told"),
    [
        (8, ["phases.0.name=other"], r"phases\.0\.name: 'short' there, 'other' in the config"),
        (3, ["phases.0.batch_tokens=512"], r"phases\.0\.batch_tokens: 1024 there, 512 in"),
        (11, ["phases.1.data.stories=0.6", "phases.1.context=64"],
         r"(?s)phases\.1\.context: 128 there, 64 in.*phases\.1\.data\.stories: 0\.3 there, 0\.6 in"),
        (11, ["phases=[{name: short, context: 64, data: {stories: 1}, tokens: 8192, batch_tokens: 1024}]"],
         r"phases\.1\.name: 'middle' there, None in"),
    ],
)  # fmt: skip
def test_phases_that_would_change_what_was_trained_are_refused(tiny, stopped, stopped_after, changes, told):
    stopped(stopped_after)
    with pytest.raises(RunMismatch, match=told):
        train(tiny("run", *changes))


def test_phases_to_come_may_change(tiny, stopped):
    """Between two phases, the next one is still free; what is done is not trained again."""
    stopped(8)
    _, folder = train(tiny("run", "phases.1.batch_tokens=2048", "phases.1.tokens=4096", "phases.2.tokens=1024"))
    assert [step for step, _ in losses(folder)] == list(range(1, 8 + 2 + 1 + 1))


def test_init_from_starts_from_the_weights_of_another_run(tiny):
    _, whole = train(tiny("whole", "phases.0.tokens=2048"))
    phases = "phases=[{name: more, context: 64, data: {stories: 1}, tokens: 1024, batch_tokens: 1024}]"
    quiet = ["optimizer.muon_lr=1e-12", "optimizer.adamw_lr=1e-12", "model.context=256"]
    _, more = train(tiny("more", phases, f"run.init_from={whole}", *quiet))
    ours = load_file(more / "checkpoints" / "step-00000001" / "model.safetensors")
    theirs = load_file(sorted((whole / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9) for name in theirs)
    with pytest.raises(RunMismatch, match=r"(?s)another model than the config describes.*model\.d_ff: 64 there, 96"):
        train(tiny("other", phases, f"run.init_from={whole}", "model.d_ff=96", "data.shards=nowhere"))
    assert not Path("nowhere").exists()  # before any data is prepared


@pytest.mark.parametrize(
    ("changes", "told", "word"),
    [
        (["phases.1.learning_rate.peak=0.5"], r"phases\.1\.learning_rate\.peak: 1\.0 there, 0\.5 in", "schedule"),
        (["optimizer.adamw_lr=0.001"], r"optimizer\.adamw_lr: 0\.003 there, 0\.001 in the config", "schedule"),
        (["phases.1.tokens=20480"], r"phases\.1\.tokens: 10240 there, 20480 in the config", "schedule"),
        (["run.seed=5"], r"run\.seed: 1234 there, 5 in the config", "order"),
        (["data.sources.stories.documents=61"], r"shards of data\.sources\.stories: '[0-9a-f]{64}' there", "data"),
    ],
)
def test_a_change_that_matters_is_refused_until_it_is_allowed(tiny, stopped, changes, told, word, capfd, whole):
    tokenizer = whole / "checkpoints" / "step-00000026" / "tokenizer"
    named = f"tokenizer.path={tokenizer}"  # or it would be another with other documents
    stopped(11, named)
    with pytest.raises(RunMismatch, match=f"(?s){told}.*run.allow=.{word}. goes on with it"):
        train(tiny("run", named, *changes))
    capfd.readouterr()
    outcome, folder = train(tiny("run", named, *changes, f"run.allow=[{word}]", "run.stop_after_steps=13"))
    assert outcome is Outcome.STOPPED and [step for step, _ in losses(folder)] == list(range(1, 14))
    assert changes[0].partition("=")[0].split(".")[-1] in capfd.readouterr().err  # it is listed
    assert train(tiny("run", named, *changes, "run.stop_after_steps=14"))[0] is Outcome.STOPPED  # and is now what it is
    with pytest.raises(RunMismatch, match=f"run.allow=.{word}. goes on with it"):
        train(tiny("run", named))


def test_nothing_allows_other_weights(tiny, stopped):
    stopped(3)
    with pytest.raises(RunMismatch, match=r"model\.d_ff: 64 there, 96 in the config \(nothing can"):
        train(tiny("run", "model.d_ff=96", "run.allow=[tokenizer, data, order, schedule]"))


def test_a_finished_run_is_extended_by_more_tokens_for_its_last_phase(tiny, whole, tmp_path):
    """The steps it had stay; those to come are the ones that a run with the longer phase would take, in its order."""
    shutil.copytree(whole, tmp_path / "runs" / "whole")
    outcome, folder = train(tiny("whole", "phases.2.tokens=12288"))
    assert outcome is Outcome.FINISHED
    assert [step for step, _ in losses(folder)] == list(range(1, 8 + 10 + 12 + 1))
    state = json.loads((sorted((folder / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["phases_done"] == ["short", "middle", "long"] and state["samples_done"]["long"] == 12 * 4
    assert train(tiny("whole", "phases.2.tokens=12288"))[0] is Outcome.FINISHED
    assert len(losses(folder)) == 30


def test_a_phase_that_ended_early_is_not_opened_again(tiny):
    patient = ["evaluation.patience=1", "evaluation.min_gain=100", "evaluation.every_steps=2"]
    _, folder = train(tiny("run", *patient))
    before = losses(folder)
    assert len(before) < 26
    train(tiny("run", *patient))
    assert losses(folder) == before


def test_a_finished_run_is_extended_by_another_phase(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs" / "whole")
    more = "{name: more, context: 64, data: {stories: 1}, tokens: 2048, batch_tokens: 1024}"
    raw = read(tiny("whole")[1], tiny("whole")[2:])
    config = validate(RunConfig, {**raw, "phases": [*raw["phases"], read_yaml(more)]})
    assert start(config) is Outcome.FINISHED
    assert [step for step, _ in losses(config.run.path)] == list(range(1, 29))


def phases(*sources: str) -> str:
    """One phase of two steps for each."""
    phase = "{{name: of-{0}, context: 64, data: {{{0}: 1}}, tokens: 2048, batch_tokens: 1024}}"
    return f"phases=[{', '.join(phase.format(source) for source in sources)}]"


def test_a_run_goes_on_with_the_tokenizer_it_has_whatever_sources_are_added(tiny):
    """One of its own, trained anew on all sources, would give every id another meaning."""
    _, folder = train(tiny("run", phases("stories")))
    (before,) = folder.glob("checkpoints/*/tokenizer/tokenizer.json")
    known = before.read_text()
    added = "data.sources.added={from: 'embedded:recall', documents: 40}"
    outcome, _ = train(tiny("run", phases("stories", "added"), added))
    assert outcome is Outcome.FINISHED and [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    assert {path.read_text() for path in folder.glob("checkpoints/*/tokenizer/tokenizer.json")} == {known}
    with pytest.raises(RunMismatch, match=r"run\.allow=\[tokenizer\] goes on with it"):
        train(tiny("run", phases("stories", "added"), added, "tokenizer.vocab_size=1030"))


def test_other_shards_in_a_phase_to_come_are_listed(tiny, capfd):
    train(tiny("run", phases("stories", "problems"), "run.stop_after_steps=2"))
    capfd.readouterr()
    assert train(tiny("run", phases("stories", "problems"), "data.sources.problems.documents=41",
                      "run.stop_after_steps=3"))[0] is Outcome.STOPPED  # fmt: skip
    assert "shards of data.sources.problems: others than before, in a phase to come" in capfd.readouterr().err
    with pytest.raises(RunMismatch, match=r"shards of data\.sources\.problems: .*run\.allow=\[data\]"):
        train(tiny("run", phases("stories", "problems")))


def test_a_step_does_not_wait_for_its_numbers(tiny, monkeypatch):
    """They are looked at when a record, a validation or a checkpoint is due."""
    read = []
    whole = StepLog.read

    def counted(log, state):
        seen = list(whole(log, state))
        read.append(len(seen))
        return iter(seen)

    monkeypatch.setattr(StepLog, "read", counted)
    train(tiny("run", phases("stories", "problems"), "phases.0.tokens=24576", "watch.log_every=10",
               "evaluation.every_steps=8", "checkpoint.every_steps=null"))  # fmt: skip
    assert [count for count in read if count] == [1, 7, 2, 6, 4, 4, 2]  # at 1, 8, 10, 16, 20, 24 and 26


def test_no_broken_checkpoint_is_kept_in_place_of_a_good_one(tiny, capfd):
    """Nor does what an interrupted save or removal left behind stay."""
    few = ["checkpoint.keep=2", "checkpoint.keep_best=false", "checkpoint.keep_phase_ends=false",
           "checkpoint.every_steps=3"]  # fmt: skip
    _, folder = train(tiny("run", *few, "run.stop_after_steps=6"))
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-00000006" / "state.json").write_text("{}")
    (checkpoints / ".tmp-step-00000003-0123abcd").mkdir()
    capfd.readouterr()
    train(tiny("run", *few, "run.stop_after_steps=5"))
    assert "it is now .step-00000006.broken-1" in capfd.readouterr().err
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == [".step-00000006.broken-1", "step-00000003", "step-00000005"]


def test_the_time_of_steps_that_were_not_recorded_is_saved_too(tiny):
    _, folder = train(tiny("run", "watch.log_every=10", "evaluation.every_steps=null", "checkpoint.every_steps=null",
                           "run.stop_after_steps=7"))  # fmt: skip
    recorded = [record["seconds"] for record in MetricsLog.read(folder / "metrics.jsonl") if record["kind"] == "train"]
    saved = json.loads((folder / "checkpoints" / "step-00000007" / "state.json").read_text())["seconds"]
    assert len(recorded) == 1 and saved > recorded[0] + 0.01


def read_yaml(text: str) -> dict:
    import yaml

    return yaml.safe_load(text)


def test_a_pause_shows_in_nothing_but_the_clock(tiny, stopped):
    """Whatever was recorded before it stays as it is, and `seconds` count training alone."""
    folder = stopped(8)
    first = MetricsLog.read(folder / "metrics.jsonl")
    time.sleep(2.5)
    train(tiny("run", "run.stop_after_steps=11"))
    records = MetricsLog.read(folder / "metrics.jsonl")
    assert [r for r in first if r["kind"] == "train"] == [r for r in records if r["kind"] == "train"][:8]
    seconds = [record["seconds"] for record in records if record["kind"] == "train"]
    assert seconds == sorted(seconds) and seconds[8] - seconds[7] < 2.4
