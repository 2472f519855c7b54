"""A request to stop is followed at any moment, with the exit code that is promised, and a second one at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Two workers with a job that never ends, told on the screen.
ENDLESS = """
import sys, time
from data.preparation import interruption
from data.preparation.workers import Workers

def main():
    interruption.interrupt_once()
    try:
        with Workers(2) as workers:
            pools = workers.map(time.sleep, [(0,), (0,), (600,), (600,)], many=True)
            next(pools), next(pools)
            print("working", flush=True)
            list(pools)
    finally:
        print("stopping", flush=True)

if __name__ == "__main__":
    main()
"""


def started(*command: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_before_anything_is_imported_is_one_line(number):
    process = started("-m", "data.prepare", "--config", "none.yaml")
    while not _catches(process, signal.SIGTERM):
        assert process.poll() is None
    assert "yaml" not in Path(f"/proc/{process.pid}/maps").read_text()  # of what is imported, among the first
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (75, "interrupted: the same command goes on from there\n")


@pytest.mark.parametrize("module", ["gsm8k", "chat", "facts"])
def test_an_evaluation_that_is_still_loading_is_interrupted_in_one_line(module):
    process = started("-m", f"evaluation.{module}", "--help")
    while not _catches(process, signal.SIGTERM):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (75, "interrupted: nothing was written; the same command begins again\n")


def _catches(process: subprocess.Popen, number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_it_and_its_workers_at_once(tmp_path, number):
    (tmp_path / "endless.py").write_text(ENDLESS)
    process = started(tmp_path / "endless.py")
    assert process.stdout.readline() == "working\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None  # waits for what its workers are at
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert said.startswith("asked a second time: ending at once; what is done so far stays\n")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_in_a_terminal_gives_no_tracebacks_of_workers_that_are_just_starting(tmp_path):
    """The terminal sends it to all of them."""
    jobs = "[(0,), (0,), (600,), (600,)]"
    script = ENDLESS.replace(jobs, "jobs()").replace("def main", """
if __name__ == "__mp_main__":  # of a worker
    time.sleep(1.5)

def jobs():
    yield (0,)
    yield (0,)
    time.sleep(0.7)
    import os, signal
    os.killpg(0, signal.SIGINT)
    time.sleep(600)

def main""").replace("finally:", "except KeyboardInterrupt:")
    (tmp_path / "starting.py").write_text(script)
    process = started(tmp_path / "starting.py")
    assert process.communicate(timeout=60) == ("stopping\n", "") and process.returncode == 0
