"""Does this code train as another commit's did, in every bit? python -m benchmarks.same_bits COMMIT --json FILE

The first 50 steps of the default run, on one CPU thread, in a git worktree of COMMIT and here, by COMMIT's config and
from a corpus that each prepares for itself; then the checkpoint that each made half way is taken up by the other. The
losses of every step and the last checkpoint's weights and optimizer state have to be the same bits. It proves that a
change which is to change nothing (files moved, code made plainer) has not, on this machine.

Exit codes: 0 the same, 1 something differs, or a run fails, 2 there is no such commit, or there is no git.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import result
from observe.metrics import MetricsLog

HERE, THERE = "here", "there"


class RunFailed(RuntimeError):
    """A run did not end as it should; the message has its last words."""


def main() -> int:
    """Train four runs, compare, print the table, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("commit", metavar="COMMIT", help="what to compare with, as git names it")
    parser.add_argument("--steps", type=_even, default=50, help="of a run, an even number (50)")
    parser.add_argument("--config", default="config.yaml", help="a file of COMMIT (config.yaml)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        folder = Path(name)
        try:
            with worktree(arguments.commit, folder / "code") as (commit, code):
                rows = compare(folder, code, code / arguments.config, arguments.steps)
        except LookupError as error:
            print(error, file=sys.stderr)
            return 2
        except RunFailed as error:
            print(error, file=sys.stderr)
            return 1
    print(result.table(rows))
    result.write("same_bits", rows, arguments.json, compared_with=commit, steps=arguments.steps)
    return 0 if all(row["holds"] for row in rows) else 1


def _even(text: str) -> int:
    steps = int(text)
    if steps < 2 or steps % 2:
        raise argparse.ArgumentTypeError(f"{text}: an even number from 2 up")
    return steps


@contextlib.contextmanager
def worktree(commit: str, path: Path) -> Iterator[tuple[str, Path]]:
    """The full name of `commit`, and its files at `path` as long as the block lasts.

    Raises:
        LookupError: git does not know it, or is not there.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(result.ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        full = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
        git("worktree", "add", "--detach", str(path), full)
    except FileNotFoundError:
        raise LookupError("git is not there: it has the other commit's files") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()
        raise LookupError(f"commit {commit}: {why[-1] if why else 'name one that `git log` shows'}") from None
    try:
        yield full, path
    finally:
        git("worktree", "remove", "--force", str(path))


def compare(folder: Path, code: Path, config: Path, steps: int) -> list[dict[str, Any]]:
    """A row for each comparison of what the files at `code` and those here do by `config`; `folder` has room for the
    runs.

    Raises:
        RunFailed: a run did not end by itself at `steps`.
    """
    half = steps // 2

    def run(name: str, side: str) -> Path:
        return train(code if side == THERE else result.ROOT, config, folder / name, folder / f"shards-{side}", steps)

    with ThreadPoolExecutor(2) as both:
        there, here = both.map(run, (THERE, HERE), (THERE, HERE))
        for name, origin in (("there, then here", there), ("here, then there", here)):
            middle = f"checkpoints/step-{half:08d}"
            shutil.copytree(origin / middle, folder / name / origin.name / middle)
        crossed = both.map(run, ("there, then here", "here, then there"), (HERE, THERE))
        runs = dict(zip(("here", "there, then here", "here, then there"), (here, *crossed), strict=True))
    rows = [{"run": "here", "compared": f"checkpoint of step {half}", **_same_tensors(there, here, half)}]
    for name, path in runs.items():
        first = 1 if path == here else half + 1
        of_losses, of_tensors = _same_losses(there, path, first), _same_tensors(there, path, steps)
        rows.append({"run": name, "compared": f"losses of steps {first} to {steps}", **of_losses})
        rows.append({"run": name, "compared": f"checkpoint of step {steps}", **of_tensors})
    return rows


def train(code: Path, config: Path, folder: Path, shards: Path, steps: int) -> Path:
    """The folder of a run in `folder` of the files at `code`, after so many `steps`, whose losses are all recorded;
    half way it was saved.

    Raises:
        RunFailed: it did not stop there by itself.
    """
    told = {
        "run.name": "run", "run.folder": folder, "run.stop_after_steps": steps, "data.shards": shards,
        "parallel.device": "cpu", "parallel.precision": "fp32", "parallel.cpu_threads": 1, "watch.log_every": 1,
        "watch.wandb": "off", "checkpoint.every_steps": steps // 2, "checkpoint.every_minutes": "null",
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in told.items()]
    finished = subprocess.run(
        [sys.executable, "multigpu_train.py", "--config", str(config), *overrides], cwd=code,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if finished.returncode != 75:
        words = (finished.stderr or finished.stdout).strip()[-1500:]
        raise RunFailed(f"a run in {code.name} ended with {finished.returncode}, not stopped at step {steps}: {words}")
    return folder / "run"


def _same_losses(one: Path, other: Path, first: int) -> dict[str, Any]:
    """Whether two runs' losses from step `first` on are the same: as numbers, in which the file keeps every bit."""
    sides = []
    for path in (one, other):
        records = MetricsLog.read(path / "metrics.jsonl")
        sides.append({r["step"]: r["loss"] for r in records if r["kind"] == "train" and r["step"] >= first})
    expected, found = sides
    differ = sorted(step for step in expected.keys() | found.keys() if expected.get(step) != found.get(step))
    return {"values": len(expected), "differ": len(differ), **({"first": f"step {differ[0]}"} if differ else {}),
            "holds": bool(expected) and not differ}  # fmt: skip


def _same_tensors(one: Path, other: Path, step: int) -> dict[str, Any]:
    """Whether weights and optimizer state of two runs' checkpoints of a step have the same names, types and bits."""
    import torch
    from safetensors.torch import load_file

    values, count, differ = 0, 0, []
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected, found = (load_file(path / "checkpoints" / f"step-{step:08d}" / name) for path in (one, other))
        for key in sorted(expected.keys() | found.keys()):
            a, b = expected.get(key), found.get(key)
            count += 1
            values += 0 if a is None else a.numel()
            alike = a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape)
            if not alike or not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b))):
                differ.append(f"{name.partition('.')[0]}: {key}")
    return {"tensors": count, "values": values, "differ": len(differ), **({"first": differ[0]} if differ else {}),
            "holds": count > 0 and not differ}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
