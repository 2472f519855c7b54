"""Signals: stop at the next step, in the middle of a validation or a sample, save and go on, end at once, deadlines."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import training.requests
from machine import process as this_process
from observe.metrics import MetricsLog
from settings import read, validate
from tests import warm
from training.requests import Requests
from training.settings import RunConfig
from training.start import start
from training.trainer import Outcome

LONG = "phases=[{name: short, context: 64, data: {stories: 1}, tokens: 1024000, batch_tokens: 1024, micro_batch: 8}]"
SHORT = LONG.replace("1024000", "8192")


def folder_of(arguments: list[str]) -> Path:
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    return config.run.path


def launched(arguments: list[str]) -> warm.Popen:
    command = [sys.executable, "multigpu_train.py", *arguments]
    return warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process: warm.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def has_trained(folder: Path):
    metrics = folder / "metrics.jsonl"
    return lambda: metrics.exists() and '"kind":"train"' in metrics.read_text()


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in MetricsLog.read(folder / "metrics.jsonl") if record["kind"] == kind]


def test_sigusr1_saves_and_goes_on(tiny):
    arguments = tiny("run", LONG, "checkpoint.every_steps=null", "evaluation.every_steps=null")
    folder, process = folder_of(arguments), launched(arguments)
    wait_for(has_trained(folder), process)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: list((folder / "checkpoints").glob("step-*")), process)
    there = len(records(folder, "train"))
    wait_for(lambda: len(records(folder, "train")) > there, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "SIGINT: the same command goes on from there" in output
    assert "SIGINT: stopping at the next step, and saving" in output


def test_a_second_request_ends_it_at_once(tiny):
    slow = ["evaluation.every_steps=1", "evaluation.tokens=100000000", "data.sources.stories.documents=2000"]
    arguments = tiny("run", LONG, "checkpoint.every_steps=null", *slow)
    folder, process = folder_of(arguments), launched(arguments)
    wait_for(has_trained(folder), process)
    os.kill(process.pid, signal.SIGSTOP)  # so that both signals come while nothing can be done about the first
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (75, 128 + signal.SIGTERM, -signal.SIGTERM)  # it may have been quick
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["reason"] == "SIGTERM" and outcome["step"] >= 1
    assert outcome["code"] in (75, process.returncode)  # saved already, and then ended by a signal nobody waits for


def test_so_soon_it_is_the_same_request():
    """A launcher passes on the Ctrl-C that its processes have seen as well."""
    before = signal.getsignal(signal.SIGINT)  # ignored, if all of this runs in the background
    requests = Requests()
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert requests.stop and requests.reason == "SIGINT" and not requests.save
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.save
    finally:
        requests.close()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [this_process.LAUNCHER_GONE, signal.SIGHUP])
def test_what_nobody_says_twice_is_no_second_request(monkeypatch, number):
    """The launcher's end may come seconds after the Ctrl-C that ended it, and once for each of its threads."""
    monkeypatch.setattr(training.requests, "SAME_REQUEST", 0.0)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored, if all of this runs under nohup
    requests = Requests()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert requests.stop and not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]
    finally:
        requests.close()
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = Requests()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not requests.stop and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        requests.close()
        signal.signal(signal.SIGHUP, before)


IN_ITS_TERMINAL = """
import fcntl, runpy, signal, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which all of this may ignore, under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_path("multigpu_train.py", run_name="__main__")
"""


def test_a_closed_terminal_saves_and_stops(tiny):
    """As when ssh loses its connection: what is still said to the terminal stops nothing."""
    arguments = tiny("run", LONG, "checkpoint.every_steps=null", "evaluation.every_steps=null")
    master, slave = pty.openpty()
    command = [sys.executable, "-c", IN_ITS_TERMINAL, *arguments]
    process = warm.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    folder = folder_of(arguments)
    while not has_trained(folder)():
        os.read(master, 65536)  # what the terminal shows, or it would be full
    os.close(master)
    assert process.wait(60) == 75
    assert [path.name for path in (folder / "checkpoints").glob("step-*")]
    assert records(folder, "event")[-1] | {"event": "stopped", "reason": "SIGHUP"} == records(folder, "event")[-1]


def test_a_request_while_preparing_interrupts():
    requests = Requests()
    try:
        with pytest.raises(KeyboardInterrupt), requests.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        requests.close()


def test_a_request_while_the_data_is_prepared_is_followed_at_once(tiny, tmp_path):
    shards = tmp_path / "shards"
    arguments = tiny("run", LONG, "data.sources.stories.documents=200000", "data.workers=2", f"data.shards={shards}")
    process = launched(arguments)
    wait_for(lambda: list(shards.glob(".work-*/read-00000")), process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped before training" in output, output
    assert time.monotonic() - began < 30
    assert list(shards.glob(".work-*/read-00000"))  # what is done stays


def test_max_minutes_stops_like_a_signal_and_counts_anew(tiny, capfd):
    arguments = tiny("run", LONG, "run.max_minutes=0.03", "evaluation.every_steps=null")
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    for _ in range(2):
        assert start(config) is Outcome.STOPPED
        assert "run.max_minutes=0.03 are over" in capfd.readouterr().out


class StopAfter:
    """Requests that ask to stop at the n-th look."""

    def __init__(self, looks: int):
        self.looks, self.save = looks, False
        self.reason = self.told = self.way_on = "test"

    @property
    def stop(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def saved(self) -> None:
        pass


def test_stopped_anywhere_even_in_a_validation_records_and_weights_are_those_of_the_unbroken_run(tiny, monkeypatch):
    """Asked to stop at every single place where a run looks up: between steps, between the batches of a validation,
    between the tokens of a sample and of a probe. Nothing is missing in the metrics, and nothing is there twice."""
    import training.start

    options = [SHORT, "evaluation.every_steps=2", "watch.sample_every=4", "watch.sample_tokens=4"]

    def run(name: str) -> Path:
        arguments = tiny(name, *options)
        config = validate(RunConfig, read(arguments[1], arguments[2:]))
        return start(config), config.run.path

    def told(folder: Path) -> list[tuple]:
        keys = ("kind", "event", "step", "loss", "val_loss", "text", "phase_end", "context")
        kept = [record for record in MetricsLog.read(folder / "metrics.jsonl")
                if record.get("event") not in ("started", "resumed", "stopped", "checkpoint")]  # fmt: skip
        return [tuple(record.get(key) for key in keys) for record in kept]

    _, whole = run("whole")
    class Stopping(training.start.Trainer):
        looks = 0

        def __init__(self, config, strategy, prepared, requests, scores):
            super().__init__(config, strategy, prepared, requests, scores)
            self.requests = StopAfter(self.looks)

    monkeypatch.setattr(training.start, "Trainer", Stopping)
    for start_again in range(200):
        outcome, broken = run("broken")
        if outcome is Outcome.FINISHED:
            break
        Stopping.looks = 2 + start_again // 2  # in the end enough for the longest piece that is done whole or not
    assert outcome is Outcome.FINISHED and start_again > 10
    assert told(whole) == told(broken)
    last, other_last = (sorted((path / "checkpoints").iterdir())[-1] for path in (whole, broken))
    assert (last / "model.safetensors").read_bytes() == (other_last / "model.safetensors").read_bytes()
    one, other = (json.loads((path / "state.json").read_text()) for path in (last, other_last))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_run_is_trained_by_one_process_at_a_time(tiny, monkeypatch):
    import filelock

    import training.start
    from training.parallel import LaunchError

    arguments = tiny("run", SHORT)
    folder = folder_of(arguments)
    folder.mkdir(parents=True)
    monkeypatch.setattr(training.start, "CLAIM_SECONDS", 0.1)
    with filelock.FileLock(folder / ".lock"), pytest.raises(LaunchError, match="being trained by another process"):
        start(validate(RunConfig, read(arguments[1], arguments[2:])))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_the_imports_is_a_request_too(tiny, number):
    """They take seconds, in which a box may be taken away."""
    script = f"""
import os, sys, multigpu_train
load = multigpu_train.load
multigpu_train.load = lambda *rest: (os.kill(os.getpid(), {int(number)}), load(*rest))[1]
sys.exit(multigpu_train.main())
"""
    done = warm.run(sys.executable, "-c", script, *tiny("run", SHORT))
    assert done.returncode == (0 if number == signal.SIGUSR1 else 75), done.stderr


def test_a_reader_that_goes_away_stops_nothing(tiny):
    command = [sys.executable, "multigpu_train.py", *tiny("run", SHORT)]
    process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait(120) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize(
    ("parents", "launcher", "environment", "ends"),
    [((7, 7), True, {}, False), ((7, 1), True, {}, True), ((1,), False, {"TORCHELASTIC_RUN_ID": "none"}, True),
     ((1,), False, {}, False), ((7,), False, {"TORCHELASTIC_RUN_ID": "none"}, False)],
    ids=["it lives", "it dies meanwhile", "it is dead", "there was none", "a shell is between"],
)  # fmt: skip
def test_a_process_whose_launcher_has_died_ends_too(monkeypatch, parents, launcher, environment, ends):
    """Killed in the first second, a launcher would leave processes that wait for each other for an hour."""
    asked, seen = [], iter(parents)
    monkeypatch.setattr(os, "getppid", lambda: next(seen))
    monkeypatch.setattr(this_process, "_is_launcher", lambda _: launcher)
    monkeypatch.setattr(this_process, "_signal_at_parents_end", asked.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) if ends else contextlib.nullcontext():
        this_process.end_with_launcher()
    assert asked == ([this_process.LAUNCHER_GONE] if launcher else [])
