"""A trace job: its plan, its identity, and who does what.

The plan is a list of keys (problem, sample), each with its own seed and request, sorted by the request's length and cut
into chunks of one size; a chunk is a batch and a folder. The job's folder carries a fingerprint of everything that
decides the content, so that what is written with other options lies elsewhere, and nothing can mix.

Any number of processes work on one folder, without talking to each other (distill/parts.py). A chunk that is there and
verifies is never written again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import filelock

from distill import traces
from distill.parts import Parts, Say
from distill.problems import ProblemSet, WordProblem
from distill.prompts import Prompts
from distill.settings import DistillConfig
from distill.teachers import Request
from storage import folder

FORMAT = 1  # raise it whenever the same config would give other requests, another plan or another parquet file


@dataclasses.dataclass(frozen=True)
class Key:
    """One answer that is wanted."""

    problem: WordProblem
    sample: int  # from 0
    seed: int


def seed_of(job_seed: int, problem: str, sample: int) -> int:
    """The seed of a key, 0 to 2^63 - 1, whatever else is in the job."""
    digest = hashlib.blake2b(f"{job_seed} {problem} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def keys_of(problems: Iterable[WordProblem], prompts: Prompts, seed: int, samples: int) -> list[Key]:
    """All keys in the order of the plan: by length of the request in characters, which no tokenizer is needed for and
    which leaves little padding in a batch; then by id and sample."""
    sized = []
    for problem in problems:
        for sample in range(samples):
            key = Key(problem, sample, seed_of(seed, problem.id, sample))
            length = sum(len(message["content"]) for message in prompts.messages(problem, key.seed))
            sized.append((length, problem.id, sample, key))
    return [key for *_, key in sorted(sized, key=lambda entry: entry[:3])]


class Job:
    """One job and its folder.

    Attributes:
        content: all that decides the traces; its fingerprint is in the folder's name.
        chunks: the keys of each chunk.
        path: the folder.
    """

    def __init__(self, config: DistillConfig, problems: ProblemSet, teacher: dict[str, Any]):
        """
        Args:
            teacher: what it says `about` itself.

        Raises:
            ConfigError: there are too few problems for the prompt.
        """
        self.prompts = Prompts(config.prompt, problems.problems)
        self.evaluation_only = config.problems_.evaluation_only
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "teacher": teacher,
            "prompt": self.prompts.about(),
            "sampling": config.sampling.model_dump(),
            "samples": config.job.samples,
            "seed": config.job.seed,
            "chunk": config.job.chunk,
            "problems": problems.digest,
            "evaluation_only": self.evaluation_only,
        }
        text = json.dumps(self.content, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.name = config.job.name
        self.path = Path(config.job.folder) / f"{self.name}-{self.fingerprint}"
        keys = keys_of(problems.problems, self.prompts, config.job.seed, config.job.samples)
        self.chunks = [keys[start : start + config.job.chunk] for start in range(0, len(keys), config.job.chunk)]
        self._about = {"problems": len(problems.problems), "left_out": problems.left_out, "keys": len(keys),
                       "source": _public(config.problems_.from_)}  # fmt: skip
        self._parts = Parts(self.path / traces.CHUNKS, "chunk")

    def requests(self, number: int) -> list[Request]:
        """What the teacher is asked for a chunk, in the order of its keys."""
        return [Request(self.prompts.messages(key.problem, key.seed), key.seed) for key in self.chunks[number]]

    def chunk(self, number: int) -> Path:
        """Where a chunk lies, or will."""
        return self._parts.path(number)

    @property
    def metadata(self) -> dict[str, str]:
        """What each chunk's parquet says of the job."""
        return {"job": self.fingerprint, "evaluation_only": json.dumps(self.evaluation_only)}

    def open(self, say: Say) -> None:
        """Make the folder, with its job.json, unless it is there.

        Raises:
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.path / ".lock"):
            try:
                if traces.read_job(self.path).get("content") == self.content:
                    return
                say(f"WARNING: {self.path / traces.JOB} tells of another job than its folder's name: written again")
            except traces.TraceError as error:
                if (self.path / traces.JOB).exists():
                    say(f"WARNING: {error}: written again")
            about = {"name": self.name, "fingerprint": self.fingerprint, "chunks": len(self.chunks), **self._about,
                     "content": self.content}  # fmt: skip
            folder.write_file(self.path / traces.JOB, json.dumps(about, indent=1, ensure_ascii=False) + "\n")

    def is_there(self, number: int) -> bool:
        """Whether a chunk is written and verifies."""
        return self._parts.is_there(number)

    def complete(self, numbers: list[int], offset: int, make: Callable[[int], None], say: Say) -> None:
        """Call `make` for each chunk of `numbers` that is not there, unless another process does it; return when all
        are there (distill.parts.Parts.complete)."""
        self._parts.complete(numbers, offset, make, say)


def part_of(numbers: Iterable[int], part: tuple[int, int]) -> list[int]:
    """Those of part (which from 1, of how many), for boxes without a common disk."""
    which, of = part
    return [number for number in numbers if number % of == which - 1]


def spread(numbers: list[int], quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)) -> list[int]:
    """Some of `numbers`, from the short requests to the long ones."""
    return sorted({numbers[int(quantile * len(numbers))] for quantile in quantiles}) if numbers else []


def _public(source: str) -> str:
    """A source without the paths of this machine."""
    kind, _, rest = source.partition(":")
    return source if kind == "hub" and rest[0] not in "/.~" and not Path(rest).is_dir() else f"local {kind} files"
