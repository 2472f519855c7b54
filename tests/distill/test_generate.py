"""The command: whatever is killed, and however many processes take part, every key is there once and with the bytes of
the unbroken run; wrong input gets one line and an exit code."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from data.preparation import clean
from distill import generate, traces
from distill.job import seed_of
from distill.problems import id_of
from storage import folder
from tests import warm
from tests.distill.conftest import save_teacher

# Of each start: how many processes, and what becomes of them. A number: all are killed when so many chunks are added.
# term: the first is asked to stop, and the others are killed.
FATES = ((1, 9), (1, "rename:5"), (4, 2), (2, "term"), (1, 9))


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
            warm.Popen(
                [sys.executable, *command, *arguments], start_new_session=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                     **({"FAULT": fault} if fault else {})},
            )
            for rank in range(count)
        ]  # fmt: skip

    def kill(self, those: list[warm.Popen]) -> None:
        for process in those:
            os.killpg(process.pid, signal.SIGKILL)
        for process in those:
            process.communicate()

    def wait(self) -> list[tuple[int, str]]:
        said = [process.communicate(timeout=300)[0] for process in self.running]
        return [(process.returncode, text) for process, text in zip(self.running, said, strict=True)]


def _suffer(arguments: list[str], folder_: Path, count: int, fate: int | str) -> None:
    """Start so many processes, and end them so."""
    done = len(list(folder_.glob("*/chunks/0*")))
    is_fault = isinstance(fate, str) and fate != "term"
    processes = Processes(arguments, count, fate if is_fault else None)
    if is_fault:
        ((code, said),) = processes.wait()
        assert code == -signal.SIGKILL, said
        assert list(folder_.glob("*/chunks/.tmp-*"))  # written, and without its name
        return
    while len(list(folder_.glob("*/chunks/0*"))) < done + (1 if fate == "term" else fate):
        assert all(process.poll() is None for process in processes.running), processes.wait()
        time.sleep(0.01)
    if fate != "term":
        return processes.kill(processes.running)
    processes.running[0].terminate()
    code, said = processes.running[0].wait(60), processes.running[0].communicate()[0]
    processes.kill(processes.running[1:])
    assert code == 75 and said.splitlines()[-1] == "interrupted: the same command goes on from there", said
    assert "Traceback" not in said


def test_whatever_is_killed_every_key_is_there_once_with_the_unbroken_runs_bytes(real_data, tmp_path):
    """A quarter of GSM8K's training problems; two tokens each."""
    source = real_data / "gsm8k" / "train.jsonl"
    questions = [json.loads(line)["question"] for line in source.open(encoding="utf-8")][:1868]
    some = tmp_path / "some.jsonl"
    some.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions), encoding="utf-8")
    teacher = save_teacher(tmp_path / "teacher", questions[:300], width=16, n_heads=1)
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump({
        "job": {"name": "gsm8k", "folder": str(tmp_path / "broken"), "seed": 5, "chunk": 16},
        "problems": {"from": f"jsonl:{some}", "valid_fraction": 0},
        "sampling": {"max_new_tokens": 2, "temperature": 1.0, "top_k": 20},
        "teacher": {"model": str(teacher), "device": "cpu"},
    }))  # fmt: skip
    arguments = ["--config", str(config)]
    assert generate.main([*arguments, f"job.folder={tmp_path / 'unbroken'}"]) == 0
    for count, fate in FATES:
        _suffer(arguments, tmp_path / "broken", count, fate)
    job, unbroken = _folder(tmp_path / "broken"), _folder(tmp_path / "unbroken")
    assert traces.missing(job)
    assert generate.main(arguments) == 0

    assert job.name == unbroken.name and not traces.missing(job)
    assert _bytes(job) == _bytes(unbroken)
    assert not [fault for chunk in traces.chunks(job) for fault in folder.verify(chunk)]
    assert not list(job.rglob(".tmp-*")) and not list(job.rglob("*.broken-*"))
    rows = list(traces.read(job))
    assert len(rows) == 1868
    assert {(row["id"], row["question"], row["sample"], row["seed"]) for row in rows} == {
        (id_of(asked), asked, 0, seed_of(5, id_of(asked), 0))
        for asked in (clean.normalise(question).strip() for question in questions)
    }


def test_parts_that_are_copied_together_are_the_whole(job, tmp_path, capsys):
    assert generate.main(job(f"job.folder={tmp_path / 'whole'}")) == 0
    for part in ("1/3", "2/3", "3/3"):
        assert generate.main(job(f"job.folder={tmp_path / part[0]}", "--part", part)) == 0
        shutil.copytree(_folder(tmp_path / part[0]), tmp_path / "together", dirs_exist_ok=True)
    whole = _folder(tmp_path / "whole")
    assert _bytes(tmp_path / "together") == _bytes(whole) and len(_bytes(whole)) == 15
    assert list(traces.read(tmp_path / "together")) == list(traces.read(whole))
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("0*/*")}
    assert generate.main(job(f"job.folder={tmp_path / 'whole'}")) == 0  # there is nothing to do, and nothing is done
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "15/15 chunks" in capsys.readouterr().out


def test_a_preview_keeps_its_chunks_and_says_what_the_rest_will_take(job, tmp_path, capsys):
    assert generate.main(job("--preview", "job.usd_per_hour=2")) == 0
    said = capsys.readouterr().out
    found = _folder(tmp_path / "traces")
    assert sorted(_bytes(found)) == ["00001", "00007", "00013"]
    assert said.count("\n--- ") == 3 and "chunks to come: 12, processes: 1, time: 0." in said
    kept = _bytes(found)
    assert generate.main(job()) == 0
    assert kept.items() <= _bytes(found).items() and len(_bytes(found)) == 15


def test_what_may_only_be_evaluated_is_marked(job, tmp_path, capsys):
    assert generate.main(job("problems.split=test")) == 2
    assert "problems.split" in capsys.readouterr().err and not (tmp_path / "traces").exists()
    assert generate.main(job("problems.split=test", "problems.evaluation_only=true", "job.samples=1")) == 0
    assert "for evaluation only" in capsys.readouterr().out
    found = _folder(tmp_path / "traces")
    assert traces.read_job(found)["content"]["evaluation_only"] is True
    metadata = pyarrow.parquet.read_schema(traces.chunks(found)[0] / traces.TRACES).metadata
    assert metadata[b"evaluation_only"] == b"true"


def test_new_problems_are_asked_for_and_may_be_solved(job, tmp_path):
    assert generate.main(job("prompt.task=write", "job.samples=1", "sampling.max_new_tokens=2")) == 0
    written = _folder(tmp_path / "traces")
    assert len({(row["prompt_tokens"], row["text"]) for row in traces.read(written)}) > 30
    solve = job(f"problems.from=traces:{written}", "job.samples=1")
    assert generate.main(solve) == 1  # of what a model that knows nothing wrote, nothing is a question


@pytest.mark.parametrize(
    ("overrides", "code", "told"),
    [(["teacher.model=nowhere"], 1, "teacher.model: nowhere"), (["prompt.examples=16", "problems.count=9"], 2, "use 8"),
     (["job.sampels=3"], 2, "did you mean samples?"), (["prompt.task=write", "prompt.shown=9", "problems.count=3"], 2,
                                                       "prompt.shown: use at most 3")],
)  # fmt: skip
def test_wrong_input_gets_a_line_and_an_exit_code(job, capsys, overrides, code, told):
    assert generate.main(job(*overrides)) == code
    said = capsys.readouterr().err
    assert told in said and len(said.splitlines()) <= 2


def test_a_job_without_answers_says_so(job, capsys):
    """A context that no request fits takes no time, and would look like success."""
    assert generate.main(job("teacher.context=6", "job.samples=1", "problems.count=9")) == 0
    assert "WARNING: 9 of 9 traces are refusals" in capsys.readouterr().out
    assert generate.main(job("job.samples=1", "problems.count=9")) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_a_disk_that_is_full_costs_the_chunk_under_way(job, tmp_path, capsys, monkeypatch):
    write, written = traces.write_chunk, []

    def full(path, *rest):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(traces, "write_chunk", full)
    assert generate.main(job()) == 1
    assert "Make room" in capsys.readouterr().err
    monkeypatch.undo()
    assert generate.main(job()) == 0
    assert not traces.missing(_folder(tmp_path / "traces"))


def test_help_is_quick_and_a_finished_job_loads_no_model(job, run):
    arguments = job("job.samples=1")
    assert generate.main(arguments) == 0
    code = ("import sys; from distill import generate; assert generate.main(sys.argv[1:]) == 0; "
            "assert 'torch' not in sys.modules")  # fmt: skip
    done = run(sys.executable, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    code = ("import sys; from distill import generate\ntry: generate.main(['--help'])\n"
            "except SystemExit: assert not {'torch', 'pyarrow', 'datasets'} & set(sys.modules)")  # fmt: skip
    assert run(sys.executable, "-c", code).returncode == 0
