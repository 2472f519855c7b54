"""Does a run end as the unbroken one does, whatever happens to it? python -m benchmarks.fault_campaign --json FILE

Each trial starts from nothing (no shards, no run), has one or several faults done to it at moments drawn from --seed,
and is started again with the same command until it ends by itself. Then its final weights and optimizer state must
equal the unbroken run's of as many processes, bit for bit; its metrics must have every step once; every checkpoint it
announced must be there or be older than those kept; and every malformed row of its corpus must be in the quarantine.

    kill              SIGKILL to all processes, at any moment from the first second on
    kill_preparing    SIGKILL while the corpus is prepared
    kill_validating   SIGKILL in the middle of a validation
    kill_saving       SIGKILL while a checkpoint is being written
    rename            SIGKILL after a checkpoint is written and before it has its name
    term              SIGTERM; the run must save and exit with 75
    disk              a full disk (a small file system of its own, if this user may mount one) while saving
    flip, cut         one bit changed in the newest checkpoint, or its file cut short
    shard             a file of the prepared shards is gone

Exit code 1: a trial failed.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks import result
from observe.metrics import MetricsLog

MOMENTS = {"kill_preparing": 24, "kill_validating": 12, "kill_saving": 3, "rename": 3}  # faulty_train.py's, up to
FAULTS = ("kill", *MOMENTS, "term", "disk", "flip", "cut", "shard")
MOST_STARTS = 40  # of one trial
DISK = 96  # MB: room for the run, until something else fills it up
ROWS, MALFORMED = 400, 7
KEPT = 3  # newest checkpoints


def main() -> int:
    """Run the unbroken runs, then the trials; print and write the table."""
    parser = result.parser(__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        root = Path(name)
        corpus = _corpus(root)
        expected = {}
        for processes in (1, 2):
            trial = Trial(root / f"unbroken-{processes}", corpus, processes, random.Random(0))
            trial.start_until_done()
            expected[processes] = trial.final()
            _check(trial.problems(expected[processes]), "the unbroken run")
        for number in range(arguments.trials):
            draw = random.Random(1000 * arguments.seed + number)
            fault, processes = FAULTS[number % len(FAULTS)], 1 + number // len(FAULTS) % 2
            rows.append(_one(root / f"trial-{number}", corpus, processes, fault, draw, expected[processes], number))
            print(result.table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + result.table(_summary(rows)))
    result.write("fault_campaign", rows, arguments.json, summary=_summary(rows), seed=arguments.seed)
    return 0 if all(row["holds"] for row in rows) else 1


def _check(problems: list[str], what: str) -> None:
    if problems:
        raise RuntimeError(f"{what}: {'; '.join(problems)}")


def _one(
    folder: Path, corpus: Path, processes: int, fault: str, draw: random.Random, expected: Any, number: int
) -> dict[str, Any]:
    with _small_disk(folder) if fault == "disk" else contextlib.nullcontext(False) as mounted:
        trial = Trial(folder, corpus, processes, draw)
        began = time.monotonic()
        problems = []
        try:
            trial.suffer(fault, bool(mounted))
            trial.start_until_done()
            problems = trial.problems(expected)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            problems = [str(error)[-2000:]]
        row = {
            "trial": number,
            "fault": fault,
            "processes": processes,
            "starts": trial.starts,
            "faults": trial.done,
            "seconds": round(time.monotonic() - began, 1),
            "holds": not problems,
            "problems": "; ".join(problems),
        }
    if row["holds"]:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for fault in FAULTS:
        mine = [row for row in rows if row["fault"] == fault]
        if mine:
            sums = {key: sum(row[key] for row in mine) for key in ("faults", "starts", "holds")}
            found.append({"fault": fault, "trials": len(mine), **sums})
    return found


def _corpus(root: Path) -> Path:
    """Stories, among them rows that are none."""
    from data import embedded

    lines = [json.dumps({"text": embedded.document("stories", index, "train", 5)}) for index in range(ROWS)]
    for number in range(MALFORMED):
        lines.insert(50 * number + 3, '{"text": ' + "x" * number)
    path = root / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`, if this user may mount one; else whether not."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)


class Trial:
    """One run in a folder of its own, and what is done to it."""

    def __init__(self, folder: Path, corpus: Path, processes: int, draw: random.Random):
        self.folder, self.processes, self.draw = folder, processes, draw
        self.starts = self.done = 0
        self.announced: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(_config(folder, corpus, processes)))
        self.run, self.shards = folder / "runs" / "trial", folder / "shards"

    # --- faults

    def suffer(self, fault: str, mounted: bool) -> None:
        """Do the fault, and be sure that it was done, some times over."""
        if fault in ("kill", "term"):
            for _ in range(self.draw.randrange(1, 4)):
                process = self._start()
                self._wait(process, seconds=self.draw.uniform(0.3, 5.5 if self.processes == 1 else 14.0))
                self._end(process, signal.SIGKILL if fault == "kill" else signal.SIGTERM)
        elif fault in MOMENTS:
            for _ in range(self.draw.randrange(1, 3)):
                self._kill_at(fault)
        elif fault == "disk":
            self._fill_disk(mounted)
        else:
            process = self._start()
            self._wait(process, until=lambda: len(self._checkpoints()) >= self.draw.randrange(2, 4))
            self._end(process, signal.SIGKILL)
            self._damage(fault)

    def _kill_at(self, fault: str) -> None:
        """Let the process itself die, at the n-th such moment."""
        process = self._start(FAULT=f"{fault}:{self.draw.randint(1, MOMENTS[fault])}")
        self._wait(process, seconds=120)
        self._end(process, signal.SIGKILL)

    def _fill_disk(self, mounted: bool) -> None:
        ballast = self.folder / "ballast"
        process = self._start()
        self._wait(process, until=lambda: len(self._checkpoints()) >= 1)
        if mounted:
            with contextlib.suppress(OSError), open(ballast, "wb") as file:
                while True:
                    file.write(bytes(65536))
            self._wait(process, seconds=90)
            if process.poll() is None:
                self._end(process, signal.SIGKILL)
                raise RuntimeError("a full disk did not end the run")
            words = process.log.read_text()
            if process.returncode != 1 or "Make room" not in words or "Traceback" in words.split("Make room")[0]:
                raise RuntimeError(f"a full disk ended it with {process.returncode}: {words[-600:]}")
            if not self._checkpoints():
                raise RuntimeError("a full disk cost the last checkpoint")
            self.done += 1
            self._announce(process)
            ballast.unlink()
        else:
            self._end(process, signal.SIGKILL)

    def _damage(self, fault: str) -> None:
        if fault == "shard":
            files = sorted(self.shards.glob("[a-z]*-*/*"))
            self.draw.choice(files).unlink()
        else:
            newest = self._checkpoints()[-1]
            path = self.draw.choice(sorted(file for file in newest.rglob("*") if file.is_file()))
            content = bytearray(path.read_bytes())
            if fault == "flip" and content:
                content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            else:
                del content[self.draw.randrange(max(1, len(content))) :]
            path.write_bytes(content)
            self.announced.discard(newest.name)  # nobody can keep what somebody else has spoiled
        self.done += 1

    # --- processes

    def start_until_done(self) -> None:
        """The same command, until it ends by itself."""
        while True:
            process = self._start()
            self._wait(process, seconds=300)
            if process.poll() is None:
                self._end(process, signal.SIGKILL)
                raise RuntimeError("it did not end by itself")
            self._announce(process)
            if process.returncode == 0:
                return
            if self.starts > MOST_STARTS:
                raise RuntimeError(f"still not done after {MOST_STARTS} starts: {process.log.read_text()[-1500:]}")

    def _start(self, **environment: str) -> subprocess.Popen:
        script = "benchmarks/faulty_train.py" if "FAULT" in environment else "multigpu_train.py"
        command = [sys.executable, script, "--config", str(self.config)]
        if self.processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(self.processes),
                      "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                      "--main_process_port", "0"]  # fmt: skip
            command = [sys.executable, *launch, *command[1:]]
        settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
        self.starts += 1
        log = self.folder.parent / f"{self.folder.name}-{self.starts}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                       cwd=result.ROOT, env={**os.environ, **settings})  # fmt: skip
        process.log = log
        return process

    def _wait(self, process: subprocess.Popen, seconds: float = 180, until: Any = lambda: False) -> None:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline and not until():
            time.sleep(0.02)

    def _end(self, process: subprocess.Popen, number: int) -> None:
        if process.poll() is None:
            self.done += 1
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise RuntimeError(f"signal {number} did not end it") from None
            if number == signal.SIGTERM and self.processes == 1 and process.returncode not in (0, 75, -signal.SIGTERM):
                raise RuntimeError(f"SIGTERM ended it with {process.returncode}: {process.log.read_text()[-1000:]}")
        elif process.returncode < 0 or process.returncode in (1, 137):
            self.done += 1  # it has killed itself, as it was told
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._announce(process)

    # --- what must hold

    def _announce(self, process: subprocess.Popen) -> None:
        self.announced |= {path.name for path in self._checkpoints()}

    def _checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"))

    def final(self) -> dict[str, str]:
        """sha256 of the last checkpoint's weights and optimizer state."""
        last = self._checkpoints()[-1]
        files = ("model.safetensors", "optimizer.safetensors")
        return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in files}

    def problems(self, expected: dict[str, str]) -> list[str]:
        """What is not as it must be."""
        found = []
        if (final := self.final()) != expected:
            found.append(f"{[name for name in final if final[name] != expected[name]]} differ from the unbroken run's")
        steps = [record["step"] for record in MetricsLog.read(self.run / "metrics.jsonl") if record["kind"] == "train"]
        if steps != list(range(1, len(steps) + 1)) or not steps:
            found.append(f"the metrics have the steps {steps}")
        kept = [path.name for path in self._checkpoints()]
        newest = kept[-KEPT:]  # those before them may be gone; ends of phases and the best stay for their own sake
        lost = sorted(name for name in self.announced - set(kept) if name >= newest[0])
        if lost:
            found.append(f"announced and lost: {lost}")
        for path in self.shards.glob("stories-*"):
            about = json.loads((path / "dataset.json").read_text())
            rows = (path / "quarantine.jsonl").read_text().splitlines()
            if len(rows) != MALFORMED or about["dropped"].get("bad_json") != MALFORMED:
                found.append(f"{len(rows)} of {MALFORMED} malformed rows are in the quarantine, {about['dropped']}")
        leftovers = [str(path) for path in self.run.rglob(".tmp-*")]
        if leftovers:
            found.append(f"left behind: {leftovers}")
        return found


def _config(folder: Path, corpus: Path, processes: int) -> dict[str, Any]:
    def phase(name: str, context: int, tokens: int) -> dict[str, Any]:
        return {"name": name, "context": context, "data": {"stories": 1}, "tokens": tokens, "batch_tokens": 1024,
                "micro_batch": 4}  # fmt: skip

    return {
        "run": {"name": "trial", "folder": str(folder / "runs")},
        "parallel": {"device": "cpu", "precision": "fp32", "cpu_threads": 1, "processes": processes},
        "model": {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "window": 16,
                  "global_every": 2},
        "tokenizer": {"vocab_size": 1024},
        "data": {"shards": str(folder / "shards"), "near_duplicates": 0.9,
                 "sources": {"stories": {"from": f"jsonl:{corpus}"}}},
        "optimizer": {"newton_schulz": "fp32"},
        "phases": [phase("short", 64, 24 * 1024), phase("long", 128, 24 * 1024)],
        "checkpoint": {"every_steps": 4, "keep": KEPT},
        "evaluation": {"every_steps": 5, "tokens": 4000, "final_tokens": 8000},
        "watch": {"log_every": 1, "wandb": "off", "sample_tokens": 5, "sample_every": 7},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
