"""deploy/torch_wheel.py against a stand-in `nvidia-smi`: which build a driver gets, and what is said when none fits."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "torch_wheel.py"
COULD_NOT_COMMUNICATE = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running."
)


@pytest.fixture(scope="module")
def torch_wheel():
    spec = importlib.util.spec_from_file_location("torch_wheel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def pin(torch_wheel) -> str:
    return torch_wheel.pinned_torch(ROOT / "requirements.txt")


@pytest.fixture
def wheel(tmp_path, run):
    """wheel(answer, status, *arguments): runs the script where nvidia-smi gives that answer (None: there is none)."""

    def wheel(answer: str | None, status: int = 0, *arguments: str):
        folder = tmp_path / "bin"
        folder.mkdir()
        if answer is not None:
            executable(
                folder / "nvidia-smi",
                '[ "$*" = "--query-gpu=driver_version --format=csv,noheader" ] || { echo "asked: $*"; exit 99; }\n'
                f"echo {shlex.quote(answer)}\nexit {status}",
            )
        return run(sys.executable, SCRIPT, *(arguments or ("--print", "--python", "PYTHON")), PATH=str(folder))

    return wheel


def executable(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("answer", "backend"),
    [
        ("595.45.04", None),
        ("580.65.06", None),
        ("580.65.06\n580.65.06", None),
        ("575.57.08", "cu129"),
        ("570.124.06", "cu129"),
        ("550.54.15", "cu126"),
        ("525.60.13", "cu126"),
        ("595.45.04\n570.124.06", "cu129"),  # the oldest counts, wherever it stands
        ("570.124.06\n595.45.04", "cu129"),
    ],
)
def test_the_driver_decides_the_build(wheel, pin, answer, backend):
    result = wheel(answer)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    if backend is None:
        assert lines == [f"PYTHON -m pip install {pin}"]
    else:
        assert len(lines) == 2
        assert lines[0].startswith("PYTHON -m pip install uv==")
        assert lines[1].startswith("PYTHON -m uv pip install --python PYTHON ")
        assert f"--torch-backend={backend}" in lines[1].split()
        assert lines[1].split()[-1] == pin


@pytest.mark.parametrize("answer", ["470.256.02", "525.60.11", "535.54.03\n470.256.02"])
def test_a_driver_too_old_for_any_build_is_an_error(wheel, answer):
    result = wheel(answer)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"NVIDIA driver {answer.splitlines()[-1]} is too old" in result.stderr
    assert "525.60.13" in result.stderr and "580" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_nvidia_smi_the_plain_pin(wheel, pin):
    result = wheel(None)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"PYTHON -m pip install {pin}"]


@pytest.mark.parametrize(
    ("answer", "status"),
    [(COULD_NOT_COMMUNICATE, 9), ("No devices were found", 0), ("[N/A]", 0), ("", 0), ("595.45.04", 15)],
)
def test_a_failing_nvidia_smi_is_said_aloud_and_gets_the_plain_pin(wheel, pin, answer, status):
    result = wheel(answer, status)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"PYTHON -m pip install {pin}"]
    assert "nvidia-smi failed" in result.stderr and answer[:60] in result.stderr
    assert "580" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_commands_are_run_in_order_and_the_first_failure_ends_it(wheel, tmp_path, pin):
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    executable(python, f'echo "$*" >> {shlex.quote(str(calls))}\ncase "$*" in *uv==*) exit 0;; esac\nexit 7')
    result = wheel("570.124.06", 0, "--python", str(python))
    ran = calls.read_text(encoding="utf-8").splitlines()
    assert [line.split()[-1].split("==")[0] for line in ran] == ["uv", "torch"]
    assert ran[1].endswith(pin)
    assert result.returncode == 7
    assert "failed (exit 7)" in result.stderr


def test_the_pin_is_read_from_the_requirements_file(torch_wheel, tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# torch==1.0.0\nnumpy==2.0.0\ntorch==9.8.7  # why\n", encoding="utf-8")
    assert torch_wheel.pinned_torch(requirements) == "torch==9.8.7"
    requirements.write_text("numpy==2.0.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="pins no torch"):
        torch_wheel.pinned_torch(requirements)


def test_the_table_was_read_for_the_pinned_version(torch_wheel, pin):
    """Another torch ships other CUDA builds: whoever moves the pin has to look the table up again."""
    assert pin.startswith(f"torch=={torch_wheel.TORCH_OF_TABLE}.")


def test_it_needs_nothing_installed(run):
    """Isolated mode without site-packages: what a fresh .venv has."""
    result = run(sys.executable, "-I", "-S", SCRIPT, "--help")
    assert result.returncode == 0, result.stderr
