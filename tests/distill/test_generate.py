"""The command: whatever is killed, and however many processes take part, every key is there once and with the bytes of
the unbroken run; wrong input gets one line and an exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from distill import generate, traces
from distill.job import seed_of
from distill.problems import id_of
from storage import folder
from tests.conftest import ROOT

# Processes, and what becomes of them: so many chunks are added and then all are killed, or one dies at a rename.
FATES = ((1, 5), (2, 9), (1, "rename:3"), (4, 1), (1, 14))
LAST = 2  # processes that are left alone


def _folder(path: Path) -> Path:
    (found,) = path.iterdir()
    return found


def _bytes(job: Path) -> dict[str, bytes]:
    return {chunk.name: (chunk / traces.TRACES).read_bytes() for chunk in traces.chunks(job)}


class Processes:
    """Ranks of one job, without a launcher, which would take seconds of its own."""

    def __init__(self, arguments: list[str], count: int, fault: str | None = None):
        command = ["benchmarks/faulty_generate.py"] if fault else ["-m", "distill.generate"]
        self.running = [
            subprocess.Popen(
                [sys.executable, *command, *arguments], cwd=ROOT, start_new_session=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                     **({"FAULT": fault} if fault else {})},
            )
            for rank in range(count)
        ]  # fmt: skip

    def kill(self) -> None:
        for process in self.running:
            os.killpg(process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[tuple[int, str]]:
        said = [process.communicate(timeout=300)[0] for process in self.running]
        return [(process.returncode, text) for process, text in zip(self.running, said, strict=True)]


def test_whatever_is_killed_every_key_is_there_once_with_the_unbroken_runs_bytes(real_data, teacher, tmp_path, capsys):
    """All of GSM8K's training problems."""
    source = real_data / "gsm8k" / "train.jsonl"
    questions = [json.loads(line)["question"] for line in source.open(encoding="utf-8")]
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump({
        "job": {"name": "gsm8k", "folder": str(tmp_path / "broken"), "seed": 5, "chunk": 128},
        "problems": {"from": f"jsonl:{source}", "valid_fraction": 0},
        "sampling": {"max_new_tokens": 4, "temperature": 1.0, "top_k": 20},
        "teacher": {"model": str(teacher), "device": "cpu"},
    }))  # fmt: skip
    arguments = ["--config", str(config)]
    assert generate.main([*arguments, f"job.folder={tmp_path / 'unbroken'}"]) == 0
    unbroken = _folder(tmp_path / "unbroken")
    for count, fate in FATES:
        done = len(_bytes(_folder(tmp_path / "broken"))) if (tmp_path / "broken").exists() else 0
        if isinstance(fate, str):
            processes = Processes(arguments, count, fate)
            ((code, said),) = processes.wait()
            assert code == -signal.SIGKILL, said
            job = _folder(tmp_path / "broken")
            assert list((job / traces.CHUNKS).glob(".tmp-*"))  # written, and without its name
            continue
        processes = Processes(arguments, count)
        while len(list(tmp_path.glob("broken/*/chunks/0*"))) < done + fate:
            assert any(process.poll() is None for process in processes.running), processes.wait()
            time.sleep(0.01)
        processes.kill()
    job = _folder(tmp_path / "broken")
    assert traces.missing(job)
    assert [code for code, _ in Processes(arguments, LAST).wait()] == [0] * LAST

    assert job.name == unbroken.name and not traces.missing(job)
    assert _bytes(job) == _bytes(unbroken)
    assert not [fault for chunk in traces.chunks(job) for fault in folder.verify(chunk)]
    assert not list(job.rglob(".tmp-*")) and not list(job.rglob("*.broken-*"))
    rows = list(traces.read(job))
    wanted = {id_of(question) for question in questions}
    assert len(wanted) == len(questions) == len(rows) == 7473
    assert {row["id"] for row in rows} == wanted
    assert all(row["seed"] == seed_of(5, row["id"], 0) and row["sample"] == 0 for row in rows)
    assert {row["question"].split()[0] for row in rows} == {question.split()[0] for question in questions}
