"""The Makefile with stand-in interpreters: what is installed when, and that a second run installs nothing."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
case "$*" in
    "-m venv --clear .venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$0" "$4/bin/accelerate" ;;
    *device_count*) echo --num_processes 1 ;;
    *"$FAIL"*) [ -z "$FAIL" ] || exit 1 ;;
esac
"""
INSTALLS = [
    "python deploy/torch_wheel.py",
    "python -m pip install --requirement requirements.txt",
    "python -m pip install --requirement requirements-dev.txt",
]


@pytest.fixture
def make(tmp_path, run):
    """make(goal, *arguments, **environment) in a copy of the Makefile's surroundings: (finished process, its calls)."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements-teacher.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def make(*arguments: str, **environment: str):
        calls.write_text("", encoding="utf-8")
        outer_make = {"MAKEFLAGS": "", "MAKELEVEL": "0"}  # these tests are themselves run by make
        settings = {"FAIL": "", "PYTHON": "./python3", "ARGS": "", "NAME": "", **outer_make, **environment}
        result = run("make", *arguments, cwd=tmp_path, **settings)
        return result, [line for line in calls.read_text(encoding="utf-8").splitlines() if " -c " not in line]

    make.folder = tmp_path
    return make


def test_test_installs_what_is_missing_once(make):
    venv = ["python3 -m venv --clear .venv"]
    pytest_call = ["python -m pytest -k this"]
    assert make("test", "ARGS=-k this")[1] == venv + INSTALLS + pytest_call
    assert make("test", "ARGS=-k this")[1] == pytest_call


def test_train_installs_no_test_tools_and_passes_its_arguments(make):
    quiet = "--quiet --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes 1"
    launch = f"accelerate launch {quiet} multigpu_train.py a.b=1"
    assert make("install")[1] == ["python3 -m venv --clear .venv", *INSTALLS[:2]]
    assert make("train", "ARGS=a.b=1")[1] == [launch]
    assert make("setup")[1] == INSTALLS[2:]


def test_changed_pins_are_installed_again(make):
    make("setup")
    assert make("setup")[1] == []
    with (make.folder / "requirements-dev.txt").open("a", encoding="utf-8") as file:
        file.write("another\n")
    assert make("setup")[1] == INSTALLS[2:]
    with (make.folder / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("another\n")
    assert make("setup")[1] == INSTALLS


def test_a_failed_installation_is_not_taken_for_done(make):
    result, calls = make("test", FAIL="requirements.txt")
    assert result.returncode != 0
    assert calls[-1] == INSTALLS[1]
    assert make("setup")[1] == INSTALLS


def test_an_old_python_is_refused(make):
    result, calls = make("train", FAIL="version_info")
    assert result.returncode != 0
    assert "Python 3.11 or later is needed" in result.stderr and "PYTHON=./python3" in result.stderr
    assert not any("venv" in call for call in calls)


def test_bench_lists_benchmarks_or_runs_one(make):
    folder = make.folder / "benchmarks"
    folder.mkdir()
    main = "parser = result.parser(__doc__)\n"
    helper = 'if __name__ == "__main__":\n    main()\n'  # which a benchmark starts
    texts = {"__init__.py": "", "result.py": "def parser():", "gpu_suite.py": main, "speed.py": main, "notes.md": main,
             "part_of_speed.py": helper}  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    result, calls = make("bench")
    assert result.stdout.split("\n")[1:] == ["  gpu_suite", "  speed", ""] and calls == []
    assert make("bench", "NAME=speed", "ARGS=--json x")[1][-1] == "python -m benchmarks.speed --json x"


def test_the_teacher_gets_an_environment_of_its_own_once(make):
    venv = "python3 -m venv --clear .venv-teacher"
    install = "python -m pip install --requirement requirements-teacher.txt"
    assert make("teacher", FAIL="teacher.txt")[1] == [venv, install]
    assert make("teacher")[1] == [install]
    assert make("teacher")[1] == []
    assert make("setup")[1] == ["python3 -m venv --clear .venv", *INSTALLS]
    with (make.folder / "requirements-teacher.txt").open("a", encoding="utf-8") as file:
        file.write("another\n")
    assert make("setup")[1] == []
    assert make("teacher")[1] == [install]


@pytest.mark.campaign
def test_what_the_teacher_needs_resolves(run, tmp_path):
    """Some two minutes: the registry's metadata, and wheels where it has none."""
    assert run(sys.executable, "-m", "venv", tmp_path / "venv").returncode == 0
    python = tmp_path / "venv" / "bin" / "python"
    result = run(python, "-m", "pip", "install", "--dry-run", "--requirement", ROOT / "requirements-teacher.txt",
                 timeout=1200)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (pin,) = re.findall(r"^vllm==(\S+)", (ROOT / "requirements-teacher.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f" vllm-{pin}" in result.stdout.splitlines()[-1]


def test_help_is_the_default_and_names_every_target(make):
    result, calls = make()
    assert calls == []
    for target in ("setup", "install", "train", "test", "lint", "bench", "campaign", "teacher"):
        assert f"make {target} " in result.stdout


def test_the_version_check_accepts_this_python(make, run):
    """The stand-in answers the check as told; here the real interpreter runs the very expression."""
    text = (make.folder / "Makefile").read_text(encoding="utf-8")
    expression = next(line for line in text.splitlines() if line.startswith("NEW_ENOUGH")).split(":= ")[1]
    assert run(sys.executable, "-c", expression).returncode == 0
