"""Installs the pinned torch, in the build that this host's NVIDIA driver can run.

    .venv/bin/python deploy/torch_wheel.py [--print]

torch's default build for Linux needs a recent driver, and many rented hosts have an older one; there torch installs
without a word and then finds no GPU. This asks `nvidia-smi` for the driver and installs the same version of torch,
built for an older CUDA, where that is needed. Without `nvidia-smi` (a CPU-only machine, a Mac) it installs the plain
pin. Builds for other CUDAs are not on the default package index: `uv` knows where torch publishes them
(`--torch-backend`), so it is installed first and used for torch alone.

It runs before anything is installed: standard library only. It sees the driver, not the card: cards older than Turing
(GTX 10, V100) have no kernels in the builds for drivers 570 and later; torch says so when it starts.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.8"  # the version whose --torch-backend values the table below was checked against


@dataclass(frozen=True)
class Build:
    """One CUDA build of torch: `backend` as uv names it (None: the default build), and the oldest driver it is for."""

    backend: str | None
    oldest_driver: str


# Linux builds of torch 2.13, newest first. That they exist is read from the build matrix of its release (CUDA 12.6,
# 12.9, 13.0, 13.2) and from public listings of its index; only the default one has been installed by us.
# Drivers: CUDA 13 needs 580. Every CUDA 12 runs on 525.60.13 and later by NVIDIA's minor-version compatibility, which
# covers compiled kernels but not PTX, so each range gets the build that holds kernels for the cards it can have:
# Blackwell cards start at driver 570 and need CUDA 12.9 (Turing to Blackwell); below that 12.6 (Maxwell to Hopper)
# reaches the most cards. The two 12.x choices follow from those documents and have not been run on such hosts by us.
TORCH_OF_TABLE = "2.13"
BUILDS = (
    Build(None, "580"),
    Build("cu129", "570"),
    Build("cu126", "525.60.13"),
)


class DriverTooOld(Exception):
    """No build of the pinned torch runs on the driver; the message names its version and what is needed."""


def numbers(version: str) -> tuple[int, ...]:
    """The parts of a version, (525, 60, 13), which compare as versions do."""
    return tuple(map(int, version.split(".")))


def pinned_torch(requirements: Path) -> str:
    """The exact torch pin of a requirements file, as `torch==X.Y.Z`; ValueError when there is none."""
    pin = re.search(r"^torch==[\w.]+", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    if not pin:
        raise ValueError(f"{requirements} pins no torch: one line must read torch==X.Y.Z")
    return pin.group()


def driver_version() -> tuple[str | None, str]:
    """The oldest driver version that `nvidia-smi` reports, and a sentence on why there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    except FileNotFoundError:
        return None, "no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi failed ({error})"
    # One line a GPU; a failing nvidia-smi prints its reason to stdout, sometimes with exit status 0.
    versions = [line.strip() for line in answer.stdout.splitlines() if re.fullmatch(r"\d+(\.\d+)+", line.strip())]
    if answer.returncode != 0 or not versions:
        said = " ".join((answer.stdout + answer.stderr).split()) or "no output"
        return None, f"nvidia-smi failed (exit {answer.returncode}: {said[:200]})"
    return min(versions, key=numbers), ""


def choose(driver: str, torch: str) -> Build:
    """The newest build that runs on `driver`; DriverTooOld when none does."""
    for build in BUILDS:
        if numbers(driver) >= numbers(build.oldest_driver):
            return build
    needs = ", ".join(f"{build.backend or 'default'} {build.oldest_driver}" for build in BUILDS)
    raise DriverTooOld(
        f"NVIDIA driver {driver} is too old for {torch}: the oldest driver that any of its builds runs on is "
        f"{BUILDS[-1].oldest_driver} (oldest driver of each build: {needs}). Update the driver, or rent a host "
        f"with {BUILDS[0].oldest_driver} or later."
    )


def commands(python: str, torch: str, build: Build) -> list[list[str]]:
    """What to run, in order, to have `torch` in that build in the environment of `python`."""
    pip = [python, "-m", "pip", "install"]
    if build.backend is None:
        return [[*pip, torch]]
    # The pin is met by any build of the same version, so an environment that moved here from another host would keep
    # the wrong one without --reinstall-package.
    uv = [python, "-m", "uv", "pip", "install", "--python", python, f"--torch-backend={build.backend}"]
    return [[*pip, UV], [*uv, "--reinstall-package", "torch", torch]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the commands instead of running them")
    parser.add_argument(
        "--python",
        default=str(ROOT / ".venv" / "bin" / "python"),
        help="interpreter of the environment to install into (default: %(default)s)",
    )
    options = parser.parse_args()

    torch = pinned_torch(ROOT / "requirements.txt")
    driver, reason = driver_version()
    if driver is None:
        build = BUILDS[0]
        found = f"{reason}: installing the default build of {torch}"
        if reason != "no nvidia-smi":
            found += f", which finds a GPU only once driver {build.oldest_driver} or later answers"
    else:
        try:
            build = choose(driver, torch)
        except DriverTooOld as error:
            print(f"torch_wheel: {error}", file=sys.stderr)
            return 2
        found = f"NVIDIA driver {driver}: installing the {build.backend or 'default'} build of {torch}"
    print(f"torch_wheel: {found}", file=sys.stderr)

    for command in commands(options.python, torch, build):
        if options.print:
            print(shlex.join(command))
            continue
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        if status != 0:
            print(f"torch_wheel: failed (exit {status}): {shlex.join(command)}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
