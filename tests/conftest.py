"""Fixtures that every room's tests share: the real text, and a way to run the project's commands.

Tests share a small machine, so each process computes on one thread unless the environment says otherwise, and threads
do not spin while they wait; that must be set before torch is imported.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as machine.process.prepare does

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real text: $SLMS_DATA, or ../shared/data beside the checkout; skips where there is none."""
    folder = Path(os.environ.get("SLMS_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real text at {folder}: name the folder that holds it in SLMS_DATA")
    return folder


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run(*command, cwd=root, timeout=300, **environment): runs a command to its end without standard input.

    Returns the finished process with `returncode`, `stdout` and `stderr`; `environment` is added to this process's own.
    """

    def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 300, **environment: str):
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """The folder of the shards and tokenizers of all small runs: equal sources find what is there. Whoever looks into
    it, or changes what is in it, names a `data.shards` of its own."""
    return tmp_path_factory.mktemp("shards")


def small_run(folder: Path, prepared: Path, name: str, *overrides: str) -> list[str]:
    """The arguments of a whole small run (tests/tiny.yaml) in `folder`."""
    places = [f"run.folder={folder / 'runs'}", f"data.shards={prepared}"]
    return ["--config", str(ROOT / "tests" / "tiny.yaml"), f"run.name={name}", *places, *overrides]


@pytest.fixture
def tiny(tmp_path: Path, prepared: Path) -> Callable[..., list[str]]:
    """tiny(name, *overrides): the arguments of a whole small run (tests/tiny.yaml) in this test's own folder."""
    return functools.partial(small_run, tmp_path, prepared)
