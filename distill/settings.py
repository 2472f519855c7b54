"""The config of a trace job (`configs/distill/*.yaml`): which problems, asked how, of which teacher, how often."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pydantic

from data import sources
from data.settings import EvaluationSet
from evaluation.problems import VALID_FRACTION
from models.inference.sampling import Sampling
from settings import Problem, Section, in_the_way, kind_of

if TYPE_CHECKING:
    from distill.teachers import Teacher

TRACES = "traces:"  # problems that another job's traces are
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class JobSection(Section):
    """How much is made, in which portions, and where it goes."""

    name: str = "traces"
    folder: str = pydantic.Field("traces", min_length=1)  # the job's own is NAME-FINGERPRINT below it
    seed: int = pydantic.Field(1234, ge=-(2**63), lt=2**63)  # of all seeds: every key has its own
    samples: int = pydantic.Field(1, ge=1, le=4096)  # answers a problem
    chunk: int = pydantic.Field(64, ge=1, le=65_536)  # keys a chunk, which is a batch
    usd_per_hour: float | None = pydantic.Field(None, ge=0)  # of the box with all its GPUs, for the progress line

    def problems(self) -> list[Problem]:
        found = []
        if not _NAME.fullmatch(self.name):
            found.append(Problem("name", self.name, "it becomes a folder's: use up to 64 letters, digits, - and _"))
        if (blocking := in_the_way(Path(self.folder))) is not None:
            remedy = f"{blocking} is {kind_of(blocking)}: name a folder, which is made when needed"
            found.append(Problem("folder", self.folder, remedy))
        return found


class ProblemsSection(Section):
    """Where the problems come from."""

    # {jsonl,parquet,text}:PATH_OR_GLOB, hub:OWNER/NAME[/CONFIG], hub:FOLDER, or traces:FOLDER of a job that wrote some
    from_: str = pydantic.Field(alias="from")
    split: sources.Split = "train"  # of a data set of the Hub
    question: str = pydantic.Field("question", min_length=1)  # column
    answer: str | None = pydantic.Field("answer", min_length=1)  # column: a number, or a solution that ends "#### N"
    count: int | None = pydantic.Field(None, ge=1)  # so many of them, those of the lowest ids
    # the `dev` part, by hash of the question: left out; not less than any student's data.valid_fraction
    valid_fraction: float = pydantic.Field(VALID_FRACTION, ge=0, le=0.5)
    evaluation_only: bool = False  # the traces are no training data, and are marked so; nothing is left out
    evaluation_sets: dict[str, EvaluationSet] = {}  # no problem that holds a question of these is asked

    def problems(self) -> list[Problem]:
        found = []
        if remedy := None if self.from_.startswith(TRACES) else _fault(self.from_):
            found.append(Problem("from", self.from_, remedy))
        folder = Path(self.from_.removeprefix(TRACES)).expanduser()
        if self.from_.startswith(TRACES) and not (folder / "job.json").is_file():
            found.append(Problem("from", self.from_, "name the folder of a job, with its job.json and chunks"))
        if self.from_.startswith("text:") and self.answer is not None:
            remedy = "use null: a text file has no columns, each of its documents is a question"
            found.append(Problem("answer", self.answer, remedy))
        if self.split == "test" and not self.evaluation_only:
            remedy = ("use train: what is taught must not be asked in the exam; for traces that are only evaluated, "
                      "set problems.evaluation_only=true, which marks them")  # fmt: skip
            found.append(Problem("split", self.split, remedy))
        for name in self.evaluation_sets:
            if not _NAME.fullmatch(name):
                found.append(Problem(f"evaluation_sets.{name}", name, "use up to 64 letters, digits, - and _"))
        return found


class PromptSection(Section):
    """How the teacher is asked."""

    task: Literal["solve", "write"] = "solve"  # write: new problems in the style of these
    system: str | None = None  # what a system turn tells it; null: none
    examples: int = pydantic.Field(0, ge=0, le=16)  # solve: so many problems with human solutions as example turns
    shown: int = pydantic.Field(3, ge=1, le=16)  # write: problems that a request shows

    def problems(self) -> list[Problem]:
        if self.task == "write" and self.examples:
            return [Problem("examples", self.examples, "use 0: `write` shows problems (`shown`), not solutions")]
        return []


class SamplingSection(Section):
    """How the answers are drawn."""

    max_new_tokens: int = pydantic.Field(320, ge=1, le=131_072)  # an answer that is longer is cut
    temperature: float = 0.7  # 0: always the likeliest
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def problems(self) -> list[Problem]:
        return [Problem(*problem) for problem in self.sampling.problems()]

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump(exclude={"max_new_tokens"}))


class TeacherSection(Section):
    """Who answers."""

    engine: Literal["local", "endpoint", "vllm"] = "local"
    # local, vllm: hub:OWNER/NAME or a Hugging Face folder; local: also a run; endpoint: the server's name for it
    model: str = pydantic.Field(min_length=1)
    # local
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: each process its own GPU, else the CPU
    # local and vllm
    context: int | None = pydantic.Field(2048, ge=2)  # positions of request and answer; null: the model's own
    # endpoint
    url: str | None = None  # up to and with /v1
    api_key_env: str | None = None  # name of the environment variable that holds the key
    # vllm
    revision: str | None = None  # at the Hub; null: today's
    options: list[str] = []  # more words for `vllm serve`
    # endpoint and vllm
    concurrency: int = pydantic.Field(64, ge=1, le=4096)  # requests under way, at each server
    allow: list[Literal["seed", "top_k", "min_p", "usage", "finish_reason"]] = []  # what the server may lack
    timeout_seconds: float = pydantic.Field(600, gt=0)  # for one reply
    tries: int = pydantic.Field(10, ge=1, le=100)  # of a request

    def problems(self) -> list[Problem]:
        found = []
        if self.engine == "endpoint" and not (self.url or "").startswith(("http://", "https://")):
            found.append(Problem("url", self.url, "name the server, for example http://127.0.0.1:8000/v1"))
        if self.engine == "vllm" and self.context is None:
            found.append(Problem("context", None, "use a number: a server reserves memory for it"))
        foreign = {"url": "endpoint", "api_key_env": "endpoint", "revision": "vllm", "options": "vllm"}
        for key, engine in foreign.items():
            if self.engine != engine and getattr(self, key):
                remedy = f"leave it out, it is of engine {engine} (the engine is {self.engine})"
                found.append(Problem(key, getattr(self, key), remedy))
        return found


class DistillConfig(Section):
    """A whole job."""

    job: JobSection = JobSection()
    problems_: ProblemsSection = pydantic.Field(alias="problems")
    prompt: PromptSection = PromptSection()
    sampling: SamplingSection = SamplingSection()
    teacher: TeacherSection

    def problems(self) -> list[Problem]:
        context, longest = self.teacher.context, self.sampling.max_new_tokens
        if self.teacher.engine != "endpoint" and context is not None and longest >= context:
            remedy = f"use fewer than teacher.context ({context}), which has to hold the prompt too"
            return [Problem("sampling.max_new_tokens", longest, remedy)]
        if self.prompt.examples and self.problems_.answer is None:
            return [Problem("prompt.examples", self.prompt.examples, "use 0: without problems.answer there are none")]
        if self.prompt.examples and self.problems_.from_.startswith(TRACES):
            return [Problem("prompt.examples", self.prompt.examples, "use 0: problems of a job have no solutions")]
        return []


def _fault(source: str) -> str | None:
    """What to change in a source of rows, if anything."""
    if source.startswith("embedded:"):
        return "name files or a data set: the embedded corpora are no rows of questions and answers"
    return sources.fault(source)


def open_teacher(section: TeacherSection, device: str | None = None, say: Callable[[str], None] = print) -> "Teacher":
    """The teacher that a config asks for; it loads and starts nothing before it is asked.

    Args:
        device: of the `local` engine, in place of the config's.

    Raises:
        TeacherError: there is no such model, or no such tokenizer.
    """
    if section.engine == "local":
        from distill.teachers.local import Local

        device = device or section.device
        return Local(section.model, dtype=section.dtype, context=section.context, device=device)
    manners = {"concurrency": section.concurrency, "allow": section.allow, "timeout_seconds": section.timeout_seconds,
               "tries": section.tries, "say": say}  # fmt: skip
    if section.engine == "vllm":
        from distill.teachers.vllm import Vllm

        model = section.model.removeprefix("hub:")
        return Vllm(model, revision=section.revision, context=section.context, options=section.options, **manners)
    from distill.teachers.endpoint import Endpoint

    return Endpoint(section.url, section.model, api_key_env=section.api_key_env, **manners)
