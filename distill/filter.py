"""Traces -> a dataset: `python -m distill.filter TRACES... --out NAME [--push OWNER/NAME | --dry-run]`.

Reads the folders that distill.generate made, gives each trace one reason (distill/selection.py says which, in which
order), and writes what is kept to `datasets/NAME-FINGERPRINT/` (distill/dataset.py), with a report, filter.md, and a
card. Traces of a job that writes problems (`prompt.task: write`) become a dataset of new questions, for another job to
solve. With --any-answer right and wrong answers stay alike: what a student wrote, for a teacher to score. The
fingerprint covers the traces' content, the options, the evaluation sets and the code's version: the same command gives
the same bytes, and a folder that is there and verifies is left alone.

Traces of test problems (`evaluation_only`) are refused, for they are no training data; `--split test` takes them and
marks the dataset and its card. Name the evaluation sets, each as NAME=SOURCE or NAME=SOURCE:FIELD (the column with the
question, else "question"), for example gsm8k=hub:openai/gsm8k/main.

--push uploads, to a private data set unless it is --public; --dry-run writes the very tree that would go, beside the
dataset, and says what is in it. Traces that were not kept go only with --all. The login is the Hub's own (HF_TOKEN, or
`hf auth login`). Exit codes: 0 done, 1 failed, 2 wrong arguments, 75 interrupted.
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption

    interruption.end_at_once()

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from data import sources
from data.preparation import interruption
from data.preparation.contamination import Questions, read_questions
from distill import dataset, report, selection, traces
from distill.selection import KEPT, Options
from machine import process
from settings import in_the_way, kind_of
from storage import folder

CODE_VERSION = 2  # raise it whenever the same traces would give another dataset
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FIELD = re.compile(r"(?P<source>\w+:.+?)(?::(?P<field>[\w -]+))?")

Log = Callable[[str], object]


class WrongArgument(Exception):
    """What was asked for makes no sense: the message says what does."""


class FilterError(Exception):
    """The traces cannot become a dataset: the message says why."""


class Exam(NamedTuple):
    """An evaluation set to look for."""

    source: str
    field: str = "question"


@dataclasses.dataclass(frozen=True)
class Licenses:
    """Of the teachers and of the problems; None: as far as it is known here (distill/report.py)."""

    teacher: str | None = None
    problems: str | None = None


class _Traces:
    """One job's folder."""

    def __init__(self, path: Path, licenses: Licenses):
        self.path = path
        self.job = traces.read_job(path)
        content = self.job.get("content", {})
        self.task = content.get("prompt", {}).get("task", "solve")
        self.evaluation_only = bool(content.get("evaluation_only"))
        self.shown = [question for question, *_ in content.get("prompt", {}).get("examples", [])]
        self.id = f"{self.job.get('name')}-{self.job.get('fingerprint')}"
        self.source = str(self.job.get("source", report.UNKNOWN)).removeprefix("hub:")
        self.teacher = _teacher(content.get("teacher", {}))
        self.licenses = (licenses.teacher or report.license_of(self.teacher),
                         licenses.problems or report.license_of(self.source))  # fmt: skip
        self.chunks = traces.chunks(path)
        if not self.chunks:
            raise traces.TraceError(f"{path} has no chunks yet: run the job first")

    def digest(self) -> str:
        """Of the content. Raises TraceError where a chunk is not what was written."""
        for chunk in self.chunks:
            if problems := folder.verify(chunk):
                raise traces.TraceError(f"{problems[0]}: run the job's command again, which makes this chunk anew")
        return _digest([self.job, {chunk.name: folder.sums(chunk) for chunk in self.chunks}])

    def rows(self) -> Iterator[dict[str, Any]]:
        for row in traces.read(self.path):
            yield {**row, "source": self.source, "teacher": self.teacher}

    def spent(self, what: str) -> float | None:
        """The sum over the chunks that tell."""
        told = [value for chunk in self.chunks if (value := traces.spent(chunk).get(what)) is not None]
        return sum(told) if told else None


def filter_traces(
    paths: Sequence[Path],
    name: str,
    root: Path,
    options: Options,
    exams: dict[str, Exam],
    split: str = "train",
    licenses: Licenses = Licenses(),  # noqa: B008  it is frozen
    log: Log = print,
) -> Path:
    """Make the dataset of these traces, unless it is there; returns its folder.

    Raises:
        WrongArgument: the traces do not go together, or not with `split`.
        traces.TraceError, FilterError, sources.SourceError: they, or an evaluation set, cannot be used.
        OSError: the disk is full.
    """
    jobs = [_Traces(path, licenses) for path in paths]
    task = _task_of(jobs, split)
    if options.any_answer and task != "solve":
        raise WrongArgument("--any-answer is of solutions, and these traces are new problems: leave it out")
    digested = sorted(((job.digest(), job) for job in jobs), key=lambda pair: pair[0])
    texts = {exam: _questions(exam, *about) for exam, about in sorted(exams.items())}
    if not texts and split == "train":
        log("WARNING: no --evaluation-set is named: nothing keeps its questions out of the dataset")
    sets = {exam: {"questions": len(found), "digest": _digest(found)} for exam, found in texts.items()}
    told = {"code": CODE_VERSION, "task": task, "split": split, "evaluation_only": split == "test",
            "options": options.described(), "evaluation_sets": sets,
            "traces": [_described(job, digest) for digest, job in digested]}  # fmt: skip
    fingerprint = _digest(told)[:12]
    path = root / f"{name}-{fingerprint}"
    if path.exists() and not folder.verify(path):
        log(f"already there: {path}")
        return path
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / ".lock"):
        if path.exists() and (problems := folder.verify(path)):
            log(f"WARNING: {problems[0]}: moved to {folder.set_aside(path)}, the dataset is made again")
        if not path.exists():
            about = {"name": name, "fingerprint": fingerprint, **told}
            _make(path, [job for _, job in digested], about, options, Questions(texts), log)
    return path


def _task_of(jobs: list[_Traces], split: str) -> str:
    """What all the jobs did."""
    if split == "train" and (exam := next((job for job in jobs if job.evaluation_only), None)):
        raise WrongArgument(f"{exam.path} holds traces of test problems, which are no training data: leave it out, or "
                            "take --split test, which marks the dataset as for evaluation only")  # fmt: skip
    if split == "test" and (other := next((job for job in jobs if not job.evaluation_only), None)):
        raise WrongArgument(f"{other.path} holds no traces of test problems (evaluation_only): leave out --split test")
    tasks = {job.task for job in jobs}
    if len(tasks) > 1 or not tasks <= {"solve", "write"}:
        told = ", ".join(f"{job.path}: {job.task}" for job in jobs)
        raise WrongArgument(f"these jobs did different things ({told}): filter them apart")
    return tasks.pop()


def _described(job: _Traces, digest: str) -> dict[str, Any]:
    teacher_license, source_license = job.licenses
    return {"job": job.id, "digest": digest, "teacher": job.teacher, "teacher_license": teacher_license,
            "source": job.source, "source_license": source_license, "chunks": len(job.chunks),
            "planned": job.job.get("chunks", len(job.chunks))}  # fmt: skip


def _make(
    path: Path, jobs: list[_Traces], about: dict[str, Any], options: Options, exams: Questions, log: Log
) -> None:
    for job, told in zip(jobs, about["traces"], strict=True):
        if told["chunks"] < told["planned"]:
            log(f"WARNING: {job.path} has {told['chunks']} of {told['planned']} chunks so far")
    for told, count in zip(about["traces"], _counted(jobs), strict=True):
        told["rows"] = count
    task = about["task"]
    try:
        if task == "solve":
            decisions = selection.choose_solutions(_rows(jobs), options, exams)
        else:
            shown = [question for job in jobs for question in job.shown]
            decisions = selection.choose_questions(_rows(jobs), options, exams, shown)
    except ValueError as error:
        raise FilterError(str(error)) from error
    figures = report.counted(_rows(jobs), decisions, selection.order(task, about["evaluation_sets"]),
                             judged=task == "solve" and not options.any_answer)  # fmt: skip
    if not figures["reasons"][KEPT]:
        why = ", ".join(f"{count:,} {reason}" for reason, count in figures["reasons"].items() if count)
        raise FilterError(f"of {figures['rows']:,} traces none is kept ({why or 'there are none'})")
    cost = {what: _sum(job.spent(what) for job in jobs) for what in ("seconds", "usd")}
    dataset.write(path, zip(_rows(jobs), decisions, strict=True), {**about, **figures, "cost": cost})


def _rows(jobs: list[_Traces]) -> Iterator[dict[str, Any]]:
    for job in jobs:
        yield from job.rows()


def _counted(jobs: list[_Traces]) -> list[int]:
    """How many rows each has, all different: the parts of a job may be named together, but no part twice."""
    seen: set[tuple[str, str, int]] = set()
    counts = []
    for job in jobs:
        before = len(seen)
        for row in job.rows():
            key = (job.id, row["id"], row["sample"])
            if key in seen:
                raise FilterError(f"{job.path} has sample {key[2]} of problem {key[1]} a second time: name every "
                                  "chunk of a job once")  # fmt: skip
            seen.add(key)
        counts.append(len(seen) - before)
    return counts


def _questions(name: str, source: str, field: str) -> list[str]:
    """All questions of an evaluation set: one that cannot be read would be looked for in no trace."""
    try:
        return read_questions(f"--evaluation-set {name}", source, field, "test")
    except OSError as error:  # of the Hub: files' own are SourceErrors
        raise sources.SourceError(f"--evaluation-set {name}: {source} cannot be read now: {error}") from error


def _sum(values: Iterator[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return round(sum(told), 6) if told else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _teacher(about: dict[str, Any]) -> str:
    """The name of a model, without the paths of this machine."""
    if "model" not in about:
        return f"a local model ({about.get('digest', report.UNKNOWN)[:12]})"
    name = about["model"].removeprefix("hub:")
    return Path(name).name if name[:1] in ("/", ".", "~") or name.count("/") > 1 or Path(name).exists() else name


def table(about: dict[str, Any]) -> str:
    """The counts, for people."""
    rows = [(reason, count) for reason, count in about["reasons"].items() if count]
    width = max(len(reason) for reason, _ in rows)
    return "\n".join(f"{reason:<{width}}  {count:>9,}  {count / about['rows']:>6.1%}" for reason, count in rows)


def _send(path: Path, args: argparse.Namespace, log: Log) -> int:
    """Upload, or say what would be uploaded."""
    if args.dry_run:
        with dataset.public(path, args.all, path.with_name(f"{path.name}-public")) as tree:
            log(f"{tree} would go to {args.push or 'the Hub'}, {'for everybody' if args.public else 'private'}:")
            for file in sorted(entry for entry in tree.rglob("*") if entry.is_file()):
                log(f"  {file.relative_to(tree)}  {file.stat().st_size:,} bytes")
        return 0
    try:
        log(dataset.upload(path, args.push, args.all, private=not args.public))
    except Exception as error:  # noqa: BLE001  whatever the Hub's client raises, nobody wants its traceback
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"{args.push} was not uploaded: {first.strip()} (log in with `hf auth login`, or set HF_TOKEN to a key "
              f"that may write there; {path} is whole, and the same command tries again)", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def _exams(texts: list[str]) -> dict[str, Exam]:
    """NAME=SOURCE[:FIELD], as they were given."""
    found: dict[str, Exam] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        match = _FIELD.fullmatch(rest)
        if not match or not _NAME.fullmatch(name):
            raise WrongArgument(f"--evaluation-set {text}: write NAME=SOURCE or NAME=SOURCE:FIELD, for example "
                                "gsm8k=jsonl:gsm8k/test.jsonl:question")  # fmt: skip
        if name in found:
            raise WrongArgument(f"--evaluation-set {text}: the name {name} is taken: give it another")
        remedy = sources.fault(match["source"])
        if match["source"].startswith("embedded:"):
            remedy = "leave it out: an embedded corpus keeps its own validation problems apart"
        if remedy:
            raise WrongArgument(f"--evaluation-set {text}: {remedy}")
        found[name] = Exam(match["source"], match["field"] or "question")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.filter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACES", help="folders traces/NAME-FINGERPRINT")
    parser.add_argument("--out", required=True, metavar="NAME", help="of the dataset")
    parser.add_argument("--folder", type=Path, default=Path("datasets"), help="where it goes (datasets)")
    parser.add_argument("--per-problem", type=int, default=4, metavar="m", help="solutions a problem, at most (4)")
    parser.add_argument("--any-answer", action="store_true",
                        help="keep wrong answers too: data for distill.score, never for plain training")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="n", help="of a text, by the teacher's count (any)")
    parser.add_argument("--evaluation-set", action="append", default=[], metavar="NAME=SOURCE[:FIELD]",
                        help="traces that hold its questions are left out; may be given again")  # fmt: skip
    parser.add_argument("--split", choices=("train", "test"), default="train", help="test: for evaluation only (train)")
    parser.add_argument("--teacher-license", metavar="ID", help="of the teacher, for the card, if it is not known here")
    parser.add_argument("--problems-license", metavar="ID", help="of the problems, likewise")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to this data set of the Hub")
    parser.add_argument("--dry-run", action="store_true", help="write what would be uploaded beside it, upload nothing")
    parser.add_argument("--public", action="store_true", help="for a new data set: for everybody (else private)")
    parser.add_argument("--all", action="store_true", help="upload the traces that were not kept, too")
    parser.add_argument("--json", action="store_true", help="print filter.json; messages go to stderr")
    return parser


def _checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with 2, and a line about all arguments that make no sense, if there are any."""
    found = []
    if not _NAME.fullmatch(args.out):
        found.append(f"--out {args.out!r}: it becomes a folder's name: use up to 64 letters, digits, - and _")
    if (blocking := in_the_way(args.folder)) is not None:
        found.append(f"--folder {args.folder}: {blocking} is {kind_of(blocking)}: name a folder, which is made when "
                     "needed")  # fmt: skip
    if args.push is not None and not _HUB_NAME.fullmatch(args.push):
        found.append(f"--push {args.push!r} is no data set: write OWNER/NAME")
    for name, value in (("--per-problem", args.per_problem), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 1:
            found.append(f"{name} {value}: use 1 or more")
    for path in args.traces:
        if not (path / traces.JOB).is_file():
            found.append(f"{path} has no {traces.JOB}: name a folder that distill.generate made, traces/NAME-...")
    if found:
        parser.error("; ".join(found))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    _checked(parser, args)
    log = lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True)  # noqa: E731
    options = Options(args.per_problem, args.max_tokens, args.any_answer)
    licenses = Licenses(args.teacher_license, args.problems_license)
    try:
        path = filter_traces(args.traces, args.out, args.folder, options, _exams(args.evaluation_set), args.split,
                             licenses, log)  # fmt: skip
        about = json.loads((path / dataset.JSON).read_text(encoding="utf-8"))
        print(json.dumps(about) if args.json else f"{table(about)}\n{path / dataset.MARKDOWN}")
        return _send(path, args, log) if args.push or args.dry_run else 0
    except WrongArgument as error:
        print(error, file=sys.stderr)
        return 2
    except (traces.TraceError, FilterError, sources.SourceError) as error:
        print(f"not filtered: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"not filtered: {error} (in {args.folder}): make room or make it writable, and give the same command "
              "again", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is half-written; the same command begins again", file=sys.stderr)
        return interruption.INTERRUPTED


if __name__ == "__main__":
    process.outlive_readers()
    interruption.interrupt_once()
    sys.exit(main())
