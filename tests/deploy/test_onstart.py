"""deploy/onstart.sh and deploy/bootstrap.sh with a stand-in Python, whose trainings end as told: what is done after
which ending, and that all of it may be cut off and called again at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_CHARACTERS = 4048  # of what vast.ai takes
PYTHON = f"""#!/bin/sh
case "$*" in
    "-c import json"*) exec {sys.executable} "$@" ;;
    *device_count*) echo --num_processes 1; exit ;;
esac
echo "$(basename "$0") $*" >> calls
case "$*" in
    "-m venv --clear .venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/accelerate ;;
    *--dry-run*) echo '{{"run": "runs/x"}}'; exit "${{PLAN_CODE:-0}}" ;;
    launch*) exec sh ./train ;;
esac
"""
# Ends as the line of `endings` says that has the number of this launch: CODE REASON, killed, or stands until SIGTERM.
# `saves` before that: it has made a checkpoint.
TRAIN = """
ending=$(sed -n "$(grep -c ' launch ' calls)p" endings)
wrote() { printf '{"code": %s, "reason": "%s", "step": 1, "message": "told"}' "$1" "$2" > runs/x/outcome.json; }
mkdir -p runs/x/checkpoints
[ ! -e runs/x/outcome.json ] || echo 'an old outcome was there' >> calls
case $ending in saves*) ending=${ending#saves }; mkdir "runs/x/checkpoints/step-$(date +%s%N)" ;; esac
case $ending in
    killed) kill -KILL $$ ;;
    stands)  # as a launcher of one process does, it ends before that has saved
        exec 8> runs/x/.lock; flock 8
        trap '(sleep 0.3; wrote 75 SIGTERM) & exit 1' TERM
        touch standing
        for _ in $(seq 600); do sleep 0.05 8>&-; done ;;
    *) wrote $ending; exit 1 ;;
esac
"""


class Box:
    """A folder with the project's scripts and stand-ins for what they call."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "deploy").mkdir()
        for name in ("Makefile", "requirements.txt", "deploy/onstart.sh"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "python3").write_text(PYTHON)
        (folder / "python3").chmod(0o755)
        (folder / "train").write_text(TRAIN)
        (folder / "environ").write_text("")

    def launch(self, *endings: str, **environment: str) -> subprocess.Popen[str]:
        """onstart.sh where the next trainings end so."""
        (self.folder / "endings").write_text("".join(f"{ending}\n" for ending in endings))
        (self.folder / "calls").write_text("")
        given = {"PYTHON": "./python3", "SLMS_WAIT": "0", "SLMS_ENVIRON": "environ", "MAKEFLAGS": "", "MAKELEVEL": "0"}
        return subprocess.Popen(
            ["bash", "deploy/onstart.sh"], cwd=self.folder, env={**os.environ, **given, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *endings: str, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.launch(*endings, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        """Installations and launches since then."""
        return (self.folder / "calls").read_text().splitlines()

    @property
    def launches(self) -> int:
        return sum(" launch " in call for call in self.calls)

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.02)


@pytest.fixture
def box(tmp_path) -> Box:
    for tool in ("make", "flock", "bash"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    return Box(tmp_path)


def test_it_sets_up_trains_and_goes_on_after_every_ending_that_is_none(box):
    code, output = box.run("1 crashed", "killed", "75 SIGTERM", "139 SIGINT", "0 finished")
    assert code == 0 and "runs/x has finished" in output
    assert box.launches == 5 and "an old outcome was there" not in box.calls
    assert "python3 -m venv --clear .venv" in box.calls
    assert "ended with code 1 (crashed)" in output and "ended without a word" in output


@pytest.mark.parametrize("reason", ["run.deadline", "run.max_minutes", "run.stop_after_steps"])
def test_it_ends_where_the_config_says_so(box, reason):
    code, output = box.run(f"75 {reason}", "0 finished")
    assert code == 75 and box.launches == 1 and f"stopped by {reason}" in output


def test_it_ends_at_a_wrong_config_without_training(box):
    code, output = box.run("0 finished", PLAN_CODE="2", SLMS_ARGS="model.n_heads=3")
    assert code == 2 and box.launches == 0 and "the config is wrong: SLMS_ARGS=model.n_heads=3" in output


def test_it_ends_where_the_run_was_refused(box):
    code, output = box.run("2 refused", "0 finished")
    assert code == 2 and box.launches == 1 and "runs/x was refused: told" in output


def test_it_waits_longer_each_time_and_gives_up_unless_checkpoints_come(box):
    code, output = box.run(*["1 crashed"] * 5, SLMS_TRIES="3")
    assert code == 1 and box.launches == 3 and "given up after 3 endings without a new checkpoint" in output
    code, output = box.run("1 crashed", "saves 1 crashed", "1 crashed", "killed", "0 finished", SLMS_TRIES="2")
    assert code == 1 and box.launches == 4
    (box.folder / "sleep").write_text("#!/bin/sh\n")  # for the pauses are what is looked at
    (box.folder / "sleep").chmod(0o755)
    code, output = box.run(*["1 crashed"] * 8, SLMS_WAIT="1", SLMS_TRIES="8", PATH=f"{box.folder}:{os.environ['PATH']}")
    assert [line.split("again in ")[1] for line in output.splitlines() if "again in" in line] == [
        f"{seconds} s" for seconds in (1, 2, 4, 8, 16, 16, 16)
    ]


def test_called_twice_it_runs_once_and_called_again_it_installs_nothing(box):
    first = box.launch("stands")
    box.wait_for("standing")
    second = subprocess.run(["bash", "deploy/onstart.sh"], cwd=box.folder, capture_output=True, text=True)
    assert second.returncode == 0 and "it is running already" in second.stderr and box.launches == 1
    first.terminate()
    first.communicate(timeout=60)
    assert box.run("0 finished")[0] == 0
    assert not any("pip" in call or "venv" in call for call in box.calls) and box.launches == 1


def test_paused_in_the_middle_it_goes_on_when_called_again(box):
    """A box that is paused takes all of its processes with it, without a word."""
    process = box.launch("stands")
    box.wait_for("standing")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (box.folder / "runs/x/outcome.json").write_text('{"code": 2, "reason": "refused"}')  # of an earlier start
    code, output = box.run("0 finished")
    assert code == 0 and box.launches == 1 and "an old outcome was there" not in box.calls, output


def test_a_signal_stops_training_which_saves_and_then_ends_it(box):
    process = box.launch("stands", "0 finished", SLMS_AT_END="touch at-end")
    box.wait_for("standing")
    assert (box.folder / "runs/.onstart").read_text().strip() == str(process.pid)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by a signal" in output and box.launches == 1
    assert '"reason": "SIGTERM"' in (box.folder / "runs/x/outcome.json").read_text()  # it was waited for
    assert not (box.folder / "at-end").exists()


def test_a_signal_during_a_pause_ends_it(box):
    process = box.launch("1 crashed", "0 finished", SLMS_WAIT="300")
    for line in process.stdout:
        if "again in 300 s" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75 and box.launches == 1


@pytest.mark.parametrize(("ending", "code"), [("0 finished", "0"), ("75 run.deadline", "75"), ("2 refused", "2")])
def test_the_command_for_the_end_learns_the_exit_code(box, ending, code):
    assert box.run(ending, SLMS_AT_END='echo "$SLMS_CODE" >> at-end')[0] == int(code)
    assert (box.folder / "at-end").read_text() == f"{code}\n"


def test_the_environment_of_the_first_process_is_read_and_written_nowhere(box):
    """As vast.ai gives it, which an ssh session does not have; what the session says itself counts more."""
    pairs = ["SLMS_ARGS=--config \"my run.yaml\" 'a.b={c: 1}'", "KEY=a secret\nof two lines", "not a name=1", "HOME=/x"]
    (box.folder / "environ").write_bytes("".join(f"{pair}\0" for pair in pairs).encode())
    at_end = '[ "$KEY" = "a secret\nof two lines" ] && [ "$HOME" != /x ] && touch ok'
    code, output = box.run("0 finished", SLMS_AT_END=at_end)
    assert code == 0 and (box.folder / "ok").exists(), output
    assert box.calls[-2] == "python multigpu_train.py --dry-run --json --config my run.yaml a.b={c: 1}"
    assert box.calls[-1].endswith("multigpu_train.py --config my run.yaml a.b={c: 1}")
    (box.folder / "environ").unlink()
    found = [path for path in box.folder.rglob("*") if path.is_file() and "a secret" in path.read_text(errors="ignore")]
    assert not found and "a secret" not in output


def test_the_bootstrap_fits_and_fetches_the_project_once(tmp_path, run):
    script = ROOT / "deploy" / "bootstrap.sh"
    assert len(script.read_text()) <= MOST_CHARACTERS
    for tool in ("git", "make", "gcc", "bash"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: the bootstrap would install it")
    origin, home = tmp_path / "origin", tmp_path / "home" / "slms"
    (origin / "deploy").mkdir(parents=True)
    home.parent.mkdir()
    (origin / "deploy" / "onstart.sh").write_text('echo "started $(git describe --tags)"\n')
    git = ["git", "-C", origin, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"], ["tag", "v1"]):
        run(*git, *arguments)
    (origin / "deploy" / "onstart.sh").write_text("echo later\n")
    run(*git, "commit", "--quiet", "-am", "two")
    given = {"SLMS_HOME": str(home), "SLMS_WAIT": "0"}
    nothing = run("bash", script, **given)
    assert nothing.returncode == 2 and "set SLMS_REPOSITORY" in nothing.stderr
    half = home.parent / "slms.new"  # of a start that was cut short
    half.mkdir()
    (half / "half").touch()
    for _ in range(2):
        started = run("bash", script, SLMS_REPOSITORY=str(origin), SLMS_REVISION="v1", **given)
        assert started.returncode == 0, started.stderr
        run("rm", "-rf", origin)  # the second time there is nothing to fetch from
    log, deadline = home / "runs" / "onstart.log", time.monotonic() + 60
    while (found := log.read_text() if log.exists() else "") != "started v1\n" * 2:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    assert not half.exists() and not (home / "half").exists()
