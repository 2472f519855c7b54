"""runs/NAME/outcome.json: there after every ending that a process lives to see, gone while it runs."""

import argparse
import contextlib
import errno
import json
from pathlib import Path

import filelock
import pytest

import multigpu_train
import training.start
from machine.rendezvous import Missing
from settings import ConfigError, Problem
from training.outcome import OutcomeFile, lock
from training.parallel import LaunchError
from training.requests import Requests
from training.stability import Diverged

SHORT = "phases=[{name: short, context: 64, data: {stories: 1}, tokens: 4096, batch_tokens: 1024}]"


def run(arguments: list[str]) -> int:
    """As the command would, in this process."""
    with contextlib.closing(Requests()) as requests:
        given = argparse.Namespace(config=arguments[1], overrides=arguments[2:], dry_run=False, json=False)
        return multigpu_train.run(given, requests)


@pytest.fixture
def outcome(tmp_path):
    """The outcome of the run x: code, reason and step; and that it is the exit code."""
    path = tmp_path / "runs" / "x" / "outcome.json"
    path.parent.mkdir(parents=True)

    def outcome(code: int) -> tuple[str, int | None]:
        found = json.loads(path.read_text())
        assert set(found) == {"code", "reason", "step", "message"} and found["code"] == code and found["message"]
        return found["reason"], found["step"]

    outcome.path = path
    return outcome


def test_a_run_that_is_stopped_refused_late_and_finished_says_so_each_time(tiny, outcome):
    assert outcome(run(tiny("x", SHORT, "run.stop_after_steps=2"))) == ("run.stop_after_steps", 2)
    assert outcome(run(tiny("x", SHORT, "no.such_key=1"))) == ("refused", None)
    assert outcome(run(tiny("x", SHORT, "run.deadline=2020-01-01T00:00Z"))) == ("run.deadline", None)
    assert len(list((outcome.path.parent / "checkpoints").iterdir())) == 1  # it trained nothing after that
    assert outcome(run(tiny("x", SHORT))) == ("finished", 4)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Diverged.__new__(Diverged, "many"), 1, "diverged"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "files"),
        (OSError(errno.ENOMEM, "a process was killed"), 1, "memory"),
        (MemoryError("not enough memory"), 1, "memory"),
        (RuntimeError("CUDA out of memory"), 1, "memory"),
        (Missing("rank 1 of 2 has not come"), 1, "missing"),
        (LaunchError("1 process started"), 2, "refused"),
        (ConfigError([Problem("a.b", 1, "use 2")]), 2, "refused"),
        (KeyboardInterrupt(), 75, "request"),
        (ValueError("a fault of ours"), 1, "crashed"),
        (SystemExit(3), 1, "crashed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_has_its_outcome(tiny, outcome, monkeypatch, error, code, reason):
    def fail(*_):
        assert not outcome.path.exists()  # the earlier one's is gone
        raise error

    outcome.path.write_text("{}")
    monkeypatch.setattr(training.start, "start", fail)
    if reason == "crashed":
        with pytest.raises(type(error)):  # with its traceback
            run(tiny("x"))
    else:
        assert run(tiny("x")) == code
    assert outcome(code) == (reason, None)


def test_a_run_that_another_process_trains_keeps_its_outcome_to_itself(tiny, outcome, monkeypatch):
    monkeypatch.setattr(training.start, "CLAIM_SECONDS", 0.1)
    with filelock.FileLock(outcome.path.parent / ".lock"):
        assert run(tiny("x", SHORT)) == 2
        assert run(tiny("x", "no.such_key=1")) == 2
        assert not outcome.path.exists()
    assert run(tiny("x", "no.such_key=1")) == 2 and outcome(2) == ("refused", None)


def test_who_waits_for_the_runs_lock_finds_its_outcome(outcome):
    """As deploy/onstart.sh does: between the end of training and the outcome nobody gets the lock."""
    run = outcome.path.parent
    file, other = OutcomeFile(run), filelock.FileLock(run / ".lock")
    with lock(run).acquire(timeout=0):  # start's
        file.hold()
    with pytest.raises(filelock.Timeout):
        other.acquire(timeout=0)
    file.write(0, "finished", "finished")
    with other.acquire(timeout=0):
        assert outcome(0) == ("finished", None)


def test_other_processes_leave_it_to_the_main_one(tiny, outcome, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    outcome.path.write_text("{}")
    monkeypatch.setattr(training.start, "start", lambda *_: (_ for _ in ()).throw(LaunchError("no")))
    assert run(tiny("x")) == 2 and outcome.path.read_text() == "{}"


@pytest.mark.parametrize("config", ["none.yaml", "run: [1]", "run: {name: ../runs, folder: runs}", "run: {name: 5}"])
def test_a_config_that_names_no_run_writes_nowhere(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    if not config.endswith("yaml"):
        Path("none.yaml").write_text(config)
    Path("runs").mkdir()
    assert run(["--config", "none.yaml"]) == 2
    assert not list(tmp_path.rglob("outcome.json"))
