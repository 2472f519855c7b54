"""A teacher's traces: accelerate launch -m distill.generate --config configs/distill/gsm8k.yaml [section.key=value ...]

Asks the teacher for every key (problem, sample) of the job, chunk by chunk, into traces/NAME-FINGERPRINT/. The same
command goes on where it was, with any number of processes, which share the chunks by file locks; `python -m
distill.generate` is the same with one process. Machines without a common disk each take a part (--part 2/3), and
copying their chunks into one folder puts them together. --preview makes a few chunks of the plan, which stay, and says
what the rest will take.

Every key has its own seed and is answered once; a chunk that is written is never written again; the same chunk has
equal bytes on the same card and build, whatever was killed and however many processes took part. Nothing is promised
across cards, builds or engines. Exit codes: 0 all chunks are there, 1 the teacher, the problems or the disk failed, 2
the config or the arguments are wrong, 75 interrupted: the chunk under way is lost, no other (asked a second time, it
ends at once with 128 + the signal's number).
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption
    from machine import process

    process.end_with_launcher()
    interruption.end_at_once()

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import settings
from data.preparation import interruption
from data.sources import SourceError
from distill import problems, tally, traces
from distill.job import Job, part_of, spread
from distill.settings import DistillConfig, open_teacher
from distill.teachers import Answer, TeacherError
from machine import process
from observe.units import compact

if TYPE_CHECKING:
    from distill.job import Key
    from distill.teachers import Teacher

PROGRESS_SECONDS = 10
SHOWN = 3  # samples of a preview
_PART = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")

Say = Callable[[str], object]


def main(arguments: list[str] | None = None) -> int:
    """Read the config, then make what is not there yet."""
    options = _parse(arguments)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    say: Say = lambda text: print(text, flush=True)  # noqa: E731
    first_says: Say = say if rank == 0 else lambda text: None  # what every process would say alike
    try:
        config = settings.load(DistillConfig, options.config, options.overrides)
        return run(config, options.part, options.preview, rank, processes, say, first_says)
    except settings.ConfigError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2
    except (SourceError, TeacherError, traces.TraceError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"stopped: {error}. Make room, or make it writable; the same command then goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interruption.MESSAGE, file=sys.stderr)
        return interruption.INTERRUPTED


def run(
    config: DistillConfig, part: tuple[int, int], preview: bool, rank: int, processes: int, say: Say, first_says: Say
) -> int:
    """Make the part's chunks, or those of a preview, together with the other processes; returns the exit code.

    Raises:
        ConfigError: there are too few problems for the prompt.
        SourceError, TeacherError, OSError: it cannot be done now; what is written stays.
    """
    found = problems.read(config.problems_, first_says)
    teacher = open_teacher(config.teacher, say=say)
    try:
        job = Job(config, found, teacher.about())
        job.open(say)
        numbers = part_of(range(len(job.chunks)), part)
        first_says(_greeting(job, found.left_out, numbers))
        wanted = spread(numbers) if preview else numbers
        worker = _Worker(config, job, teacher, wanted, processes, first_says)
        job.complete(wanted, rank * len(wanted) // processes, worker.make, say)
        if rank == 0:
            say(worker.preview(numbers) if preview and wanted else worker.line(last=True))
            worker.warn()
            say(f"traces: {job.path}")
        return 0
    finally:
        teacher.close()


class _Worker:
    """Makes chunks, and tells how far all processes have come."""

    def __init__(
        self, config: DistillConfig, job: Job, teacher: "Teacher", wanted: list[int], processes: int, say: Say
    ):
        self._config, self._job, self._teacher, self._wanted = config, job, teacher, wanted
        self._processes, self._say = processes, say
        self._spent: dict[int, dict[str, Any]] = {}
        self._began = self._told = time.monotonic()
        self._before = self._tally()
        self._versions: dict[str, Any] | None = None

    def make(self, number: int) -> None:
        """Ask the teacher for a chunk, and write it."""
        if self._versions is None:
            self._versions = self._teacher.versions()  # which loads it, outside the seconds of the first chunk
        keys, began = self._job.chunks[number], time.monotonic()
        sampling = self._config.sampling
        answers = self._teacher.answer(self._job.requests(number), sampling.sampling, sampling.max_new_tokens)
        seconds = time.monotonic() - began
        rows = [_row(key, answer) for key, answer in zip(keys, answers, strict=True)]
        price = self._config.job.usd_per_hour
        spent = {
            **self._versions,
            "seconds": round(seconds, 3),
            # the box is paid for all of its processes at once
            "usd": None if price is None else seconds / 3600 * price / self._processes,
            **tally.counts(rows),
        }
        traces.write_chunk(self._job.chunk(number), rows, spent, self._job.metadata)
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            self._say(self.line())

    def line(self, last: bool = False) -> str:
        """How far all processes have come."""
        now = self._tally()
        seconds = time.monotonic() - self._began
        chunks = now.chunks - self._before.chunks
        left = seconds / chunks * (len(self._wanted) - now.chunks) if chunks else None
        pace = (now.tokens - self._before.tokens) / seconds if chunks else None
        return tally.line(self._job.name, now, len(self._wanted), pace, 0 if last else left)

    def preview(self, numbers: list[int]) -> str:
        """Samples of the chunks that were made, and what the others of `numbers` will take."""
        now = self._tally()
        chunks = [self._job.chunk(number) for number in self._wanted[:SHOWN]]
        rows = [traces.read_chunk(chunk, self._job.fingerprint)[0] for chunk in chunks]
        shown = [
            "--- {question}\n{text}\n(finish: {finish}, {tokens} tokens; right answer: {answer})".format(
                **{**row, "answer": row["answer"] or "unknown"}
            )
            for row in rows
        ]
        seconds = [spent["seconds"] for spent in self._spent.values()]
        tokens_per_second = now.tokens / sum(seconds) if sum(seconds) else None
        left = sum(not self._job.is_there(number) for number in numbers)
        estimate = tally.Estimate.of(seconds, left, self._processes, self._config.job.usd_per_hour)
        return "\n".join([
            *shown,
            f"{now.chunks} chunks measured: {compact(tokens_per_second)} tok/s a process, {now.acceptance}, "
            f"{now.tokens / now.keys:.0f} tokens a trace",
            f"chunks to come: {left:,}, processes: {self._processes}, time: {estimate}",
        ])  # fmt: skip

    def warn(self) -> None:
        """Say so where keys have no answer, which costs no time and would look like success."""
        now = self._tally()
        if now.refused:
            self._say(f"WARNING: {now.refused:,} of {now.keys:,} traces are refusals and hold no answer: their "
                      "requests do not fit teacher.context or the chat template, or the server would not answer")

    def _tally(self) -> tally.Tally:
        """Of the wanted chunks that are there, whoever made them; each is looked at once."""
        for number in self._wanted:
            if number not in self._spent and (spent := traces.spent(self._job.chunk(number))):
                self._spent[number] = spent
        return tally.Tally.of(self._spent.values())


def _row(key: "Key", answer: Answer) -> dict[str, Any]:
    return {
        "id": key.problem.id,
        "sample": key.sample,
        "seed": key.seed,
        "question": key.problem.question,
        "answer": key.problem.answer,
        **dataclasses.asdict(answer),
        "text": answer.text.encode(errors="replace").decode(),  # half a surrogate pair, which a server's JSON can hold
    }


def _greeting(job: Job, left_out: dict[str, int], numbers: list[int]) -> str:
    keys = sum(len(job.chunks[number]) for number in numbers)
    told = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "none"
    part = "" if len(numbers) == len(job.chunks) else f" of {len(job.chunks):,}"
    marked = "; for evaluation only" if job.evaluation_only else ""
    return f"{job.path}: {keys:,} keys in {len(numbers):,}{part} chunks{marked}; problems left out: {told}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the job, for example configs/distill/gsm8k.yaml")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="WHICH/OF", help="only this part of the chunks")
    parser.add_argument("--preview", action="store_true", help="make a few chunks and say what the rest will take")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the config file")
    return parser.parse_intermixed_args(arguments)


def _part(text: str) -> tuple[int, int]:
    match = _PART.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write WHICH/OF, for example 2/3")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    process.outlive_readers()
    interruption.interrupt_once()
    process.leave(main())
