"""Is every trace there once, whatever happens to its job? python -m benchmarks.trace_campaign --json FILE

One job is killed --kills times under `accelerate launch` with 1 to 4 processes, with SIGKILL to all of them and the
launcher: a quarter of the times when a chunk is written whole and has no name yet (faulty_generate.py), else at any
moment from the start on. The same command then ends it. Its keys must be those of the plan, once each and with their
own seeds; its chunks must verify and have the bytes of a job that nothing happened to; nothing may be left behind.

The teacher is a random model of two layers, the problems are made up: about the machinery, not about answers. Exit code
1: something does not hold.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import result
from distill import traces
from distill.job import seed_of
from distill.problems import id_of
from storage import folder

PROBLEMS, SAMPLES, CHUNK, SEED = 2500, 2, 8, 11
LATEST = 3.0  # seconds after the first new chunk
MOST_RENAMES = 3  # of one process, before the one at which it dies


def main() -> int:
    """Make the unbroken job, kill the other one, compare."""
    parser = result.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="traces-") as name:
        campaign = Campaign(Path(name))
        campaign.run_unbroken()
        for number in range(arguments.kills):
            kind = "rename" if number % 4 == 3 else "kill" if number % 4 else "kill_starting"
            rows.append({"kill": number + 1, **campaign.kill(kind, 1 + number // 4 % 4, draw)})
            print(result.table(rows[-1:]).splitlines()[-1], flush=True)
        rows.append({"kill": None, **campaign.finish(2)})
        idle = [row["kill"] for row in rows[:-1] if not row["in_the_midst"]]
        problems = campaign.problems() + ([f"kills that met no job: {idle}"] if idle else [])
    print("\n" + result.table(rows))
    for problem in problems:
        print(f"does not hold: {problem}")
    result.write("trace_campaign", rows, arguments.json, seed=arguments.seed, keys=PROBLEMS * SAMPLES,
                 holds=not problems, problems=problems)  # fmt: skip
    return 1 if problems else 0


class Campaign:
    """One job, what is done to it, and one to which nothing is done."""

    def __init__(self, root: Path):
        self.root, self.log = root, root / "log"
        self.questions = [_question(number) for number in range(PROBLEMS)]
        lines = [json.dumps({"question": question, "answer": "#### 7"}) for question in self.questions]
        (root / "problems.jsonl").write_text("\n".join(lines) + "\n")
        _save_teacher(root / "teacher")
        self.config = root / "job.yaml"
        self.config.write_text(yaml.safe_dump({
            "job": {"name": "campaign", "folder": str(root / "broken"), "seed": SEED, "samples": SAMPLES,
                    "chunk": CHUNK},
            "problems": {"from": f"jsonl:{root / 'problems.jsonl'}", "valid_fraction": 0},
            "sampling": {"max_new_tokens": 48, "temperature": 1.0, "top_k": 50},
            "teacher": {"model": str(root / "teacher"), "device": "cpu"},
        }))  # fmt: skip

    def run_unbroken(self) -> None:
        """The same job in another folder, in one process and without a launcher."""
        command = [sys.executable, "-m", "distill.generate", "--config", str(self.config)]
        done = subprocess.run([*command, f"job.folder={self.root / 'unbroken'}"], cwd=result.ROOT, env=_environment(),
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the unbroken job failed: {done.stderr[-2000:]}")

    def kill(self, kind: str, processes: int, draw: random.Random) -> dict[str, Any]:
        """Start the job and kill it; returns what was done."""
        before, began = self._count(), time.monotonic()
        fault = f"rename:{draw.randint(1, MOST_RENAMES)}" if kind == "rename" else None
        launched = self._start(processes, fault)
        if kind == "rename":
            self._wait_for_death(launched)
        elif kind == "kill":
            while self._count() == before and launched.poll() is None:
                time.sleep(0.02)
            _wait(launched, draw.uniform(0, LATEST))
        else:  # while it imports, reads problems, loads the teacher, or writes a first chunk
            _wait(launched, draw.uniform(1, 10))
        is_killed = launched.poll() is None
        self._end(launched)
        if kind == "rename":
            is_killed = bool(list(self._chunks().glob(".tmp-*")))
        return {"kind": kind, "processes": processes, "chunks_before": before, "chunks_after": self._count(),
                "in_the_midst": is_killed, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip

    def finish(self, processes: int) -> dict[str, Any]:
        """The same command, left alone."""
        before, began = self._count(), time.monotonic()
        launched = self._start(processes)
        code = launched.wait(600)
        if code:
            raise RuntimeError(f"the job ended with {code}: {self.log.read_text()[-2000:]}")
        return {"kind": "none", "processes": processes, "chunks_before": before, "chunks_after": self._count(),
                "in_the_midst": False, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip

    def problems(self) -> list[str]:
        """What does not hold."""
        (job,), (unbroken,) = (list((self.root / name).iterdir()) for name in ("broken", "unbroken"))
        found = [f"{job.name} is another job than {unbroken.name}"] if job.name != unbroken.name else []
        found += [f"not there: chunk {number}" for number in traces.missing(job)]
        found += [fault for chunk in traces.chunks(job) for fault in folder.verify(chunk)]
        rows = [(row["id"], row["sample"], row["seed"], row["question"]) for row in traces.read(job)]
        wanted = {(id_of(question), sample, seed_of(SEED, id_of(question), sample), question)
                  for question in self.questions for sample in range(SAMPLES)}  # fmt: skip
        if len(rows) != len(set(rows)) or set(rows) != wanted:
            found.append(f"{len(rows)} rows, {len(set(rows))} of them different, for {len(wanted)} keys")
        differ = [chunk.name for chunk in traces.chunks(job) if (chunk / traces.TRACES).read_bytes()
                  != (unbroken / traces.CHUNKS / chunk.name / traces.TRACES).read_bytes()]  # fmt: skip
        found += [f"other bytes than the unbroken job's: {', '.join(differ)}"] if differ else []
        left = [path.name for path in job.rglob("*") if path.name.startswith(".tmp-") or ".broken-" in path.name]
        return found + ([f"left behind: {', '.join(left)}"] if left else [])

    def _start(self, processes: int, fault: str | None = None) -> subprocess.Popen:
        program = ["benchmarks/faulty_generate.py"] if fault else ["-m", "distill.generate"]
        several = ["--multi_gpu"] if processes > 1 else []
        command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes),
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
                   "0", *program, "--config", str(self.config)]  # fmt: skip
        environment = _environment(ACCELERATE_USE_CPU="true", **({"FAULT": fault} if fault else {}))
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, cwd=result.ROOT, env=environment, stdout=log, stderr=log,
                                    start_new_session=True)  # fmt: skip

    def _wait_for_death(self, launched: subprocess.Popen) -> None:
        """Until one process has died; the launcher takes its time to notice."""
        deadline = time.monotonic() + 120
        while launched.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _end(self, launched: subprocess.Popen) -> None:
        """SIGKILL to all; the processes lie in groups of their own, and would else hear of it by the launcher's end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(launched.pid).children(recursive=True), psutil.Process(launched.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        launched.wait()

    def _chunks(self) -> Path:
        return next((self.root / "broken").glob("*/chunks"), self.root / "none")

    def _count(self) -> int:
        return len(list(self._chunks().glob("[0-9]*")))


def _wait(process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def _question(number: int) -> str:
    things = ("apples", "boxes of pears", "pens", "old books about ships")
    return (f"Ann has {number} {things[number % 4]}{' and counts them' * (number % 9)}. She buys {number % 7} more. "
            "How many has she?")  # fmt: skip


def _save_teacher(path: Path) -> None:
    """A run whose model has random weights."""
    import checkpoints
    from checkpoints import checkpoint
    from data import embedded
    from models import ModelConfig, build_model
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.train([embedded.document("stories", number, "train", 1) for number in range(1500)], 1024)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, context=512, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1,
                        d_ff=64)  # fmt: skip
    weights = {name: tensor.contiguous() for name, tensor in build_model(shape, seed=3).state_dict().items()}
    checkpoint.save(path / "checkpoints", checkpoints.RunState(seed=1), model=weights, optimizer={},
                    model_config=shape, run_config={}, tokenizer=tokenizer)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
