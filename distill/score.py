"""A teacher's probabilities beside prepared shards: python -m distill.score SHARDS --teacher T [--k 16]

SHARDS is a folder that data.prepare made, shards/NAME-FINGERPRINT. For each of its trained tokens, of both splits, the
teacher's k likeliest tokens in that place and their log-probabilities go to shards/scores-NAME-FINGERPRINT (format:
data/scores.py), where a phase with `distill` finds them. The teacher is a run, a Hugging Face folder or hub:OWNER/NAME;
its tokenizer has to be the shards' own. It reads what a student reads in training: what begins a text, then the
document, whole, or where that is longer than --context in windows of so many tokens.

The same command goes on where it was, with any number of processes (accelerate launch -m distill.score ...), which
share the work by file locks. The fingerprint covers the shards, the teacher, k, --context, the type of its weights and
the code's version; with these, --batch, the card and the build, the bytes are the same, whatever was killed. Exit
codes: 0 the scores are there, 1 the shards, the teacher or the disk failed, 2 wrong arguments, or a teacher of another
tokenizer, 75 interrupted (asked a second time, it ends at once with 128 + the signal's number).
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption
    from machine import process

    process.end_with_launcher()
    interruption.end_at_once()

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import numpy as np

import checkpoints
from checkpoints import CheckpointError
from data import scores, shards
from data.preparation import interruption
from distill.parts import Parts
from distill.teachers import TeacherError
from distill.teachers.local import DTYPES, device_of, identity, resolved
from machine import process
from models.kernels.limits import LOGITS_AT_ONCE
from observe.units import compact, duration
from storage import folder
from tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    import torch

    from data.token_shards import TokenShards

CODE_VERSION = 1  # raise it whenever the same arguments would give other scores
PART_TOKENS = 262_144  # tokens of a part, which is what an interruption costs at most
CONTEXT = 8192  # tokens that the teacher reads at once, unless another number is asked for
PROGRESS_SECONDS = 10
_DTYPES = ("auto", "bf16", "fp32")

Say = Callable[[str], object]


class WrongArgument(Exception):
    """What was asked for makes no sense: the message says what does."""


class ScoreError(Exception):
    """The shards cannot be scored: the message says why."""


class Part(NamedTuple):
    """Documents of one shard, from the first up to, not including, the last."""

    split: str
    shard: int
    first: int
    last: int


class Window(NamedTuple):
    """A piece of a document that the teacher reads at once."""

    document: int
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Manner:
    """How the teacher is asked."""

    k: int
    batch: int = 8  # windows at once
    context: int = CONTEXT
    dtype: str = "auto"
    device: str = "auto"


def score(path: Path, teacher: str, manner: Manner, rank: int = 0, processes: int = 1, say: Say = print) -> Path:
    """Make the scores of the shards in the folder `path`, unless they are there; returns their folder.

    Raises:
        WrongArgument: `path` is no folder of shards, k is too large, or the tokenizers differ.
        ScoreError: the shards do not verify.
        TeacherError, CheckpointError, TokenizerError: the teacher cannot be used.
        OSError: the disk is full.
    """
    about = _described(path)
    located = checkpoints.locate(teacher)
    tokenizer = Tokenizer.load(checkpoints.tokenizer_of(located))
    if tokenizer.fingerprint != about["tokenizer_fingerprint"]:
        raise WrongArgument(f"--teacher {teacher} has another tokenizer (fingerprint {tokenizer.fingerprint}) than the "
                            f"shards in {path} ({about['tokenizer_fingerprint']}), so its probabilities are of other "
                            "tokens: name a teacher with the same, or prepare with tokenizer.path=TEACHER")  # fmt: skip
    if manner.k > tokenizer.vocab_size:
        raise WrongArgument(f"--k {manner.k}: use at most the tokenizer's {tokenizer.vocab_size} entries")
    manner = dataclasses.replace(manner, device=device_of(manner.device))
    manner = dataclasses.replace(manner, dtype=resolved(manner.dtype, manner.device))
    told = {"code": CODE_VERSION, "shards": shards.digest(path), "teacher": identity(teacher, located), "k": manner.k,
            "context": manner.context, "dtype_of_weights": manner.dtype}  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    target = path.parent / f"scores-{about['name']}-{fingerprint}"
    lock = filelock.FileLock(path.parent / ".lock")  # which a preparation beside it holds as well
    if target.exists() and not folder.verify(target):
        say(f"already there: {target}")
        return target
    if target.exists():
        with lock:
            if problems := folder.verify(target):
                say(f"WARNING: {problems[0]}: moved to {folder.set_aside(target)}, the scores are made again")
    work = path.parent / f".{target.name}"
    job = _Job(path, about, located, tokenizer.vocab_size, manner, Parts(work, "part"), target, say)
    numbers = list(range(len(job.plan)))
    try:
        job.parts.complete(numbers, rank * len(numbers) // processes, job.make, say)
    except FileNotFoundError:  # another process has joined the parts, and is tidying up
        if not target.exists():
            raise
    with lock:
        if not target.exists():
            job.join(told)
        shutil.rmtree(work, ignore_errors=True)
    say(f"scores: {target}")
    return target


def _described(path: Path) -> dict[str, Any]:
    if not (path / shards.DESCRIPTION).is_file():
        raise WrongArgument(f"{path} has no {shards.DESCRIPTION}: name a folder that data.prepare made, shards/NAME-"
                            "FINGERPRINT")  # fmt: skip
    if problems := folder.verify(path):
        raise ScoreError(f"{problems[0]}: prepare these shards again (the command that made them does)")
    return shards.describe(path)


class _Job:
    """The parts of one folder of scores, and how they are made."""

    def __init__(
        self, path: Path, about: dict[str, Any], teacher: Path, entries: int, manner: Manner, parts: Parts,
        target: Path, say: Say,
    ):  # fmt: skip
        from data.token_shards import TokenShards

        self.parts, self._about, self._target, self._say = parts, about, target, say
        self._teacher, self._entries, self._manner = teacher, entries, manner
        self._tokens = {split: TokenShards(path, split) for split in shards.SPLITS}
        self._dtype = np.dtype(about["dtype"]).newbyteorder("<")
        self.plan = [part for split, tokens in self._tokens.items() for part in _plan(split, tokens)]
        self._began = self._told = time.monotonic()
        self._read = 0

    def make(self, number: int) -> None:
        """Score a part, and write its folder."""
        if self._target.exists():  # somebody else has made everything meanwhile
            return
        part = self.plan[number]
        ids, logprobs = self._scored(self._tokens[part.split], part)
        with folder.write(self.parts.path(number)) as temporary:
            ids.astype(self._dtype).tofile(temporary / f"part{scores.IDS}")
            logprobs.astype(scores.LOGPROB).tofile(temporary / f"part{scores.LOGPROBS}")
        self._read += int(self._tokens[part.split].lengths[part.first : part.last].sum())
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            self._say(self._line())

    def join(self, told: dict[str, Any]) -> None:
        """Put the parts together: each shard's scores in a pair of files of the shard's name."""
        splits: dict[str, dict[str, Any]] = {}
        with folder.write(self._target) as temporary:
            for split, tokens in self._tokens.items():
                stems = tokens.about["shards"]
                for stem in stems:
                    for kind in (scores.IDS, scores.LOGPROBS):
                        (temporary / f"{stem}{kind}").touch()
                for number, part in enumerate(self.plan):
                    for kind in (scores.IDS, scores.LOGPROBS) if part.split == split else ():
                        with (open(self.parts.path(number) / f"part{kind}", "rb") as source,
                              open(temporary / f"{stems[part.shard]}{kind}", "ab") as joined):  # fmt: skip
                            shutil.copyfileobj(source, joined)
                splits[split] = {"scored": tokens.trained_tokens, "shards": stems}
            about = {**told, "name": self._about["name"], "dtype": self._dtype.name, "splits": splits,
                     "tokenizer_fingerprint": self._about["tokenizer_fingerprint"]}  # fmt: skip
            (temporary / scores.DESCRIPTION).write_text(json.dumps(about, indent=1), encoding="utf-8")

    def _scored(self, tokens: "TokenShards", part: Part) -> tuple[np.ndarray, np.ndarray]:
        """(ids, log-probabilities), [trained, k] each, of a part's documents in order."""
        from models.kernels.ignored import IGNORE

        model = self._model
        windows = list(_windows(tokens, part, model.config.context))
        pieces = [tokens.piece(*window) for window in windows]
        trained = np.array([int((labels != IGNORE).sum()) for _, labels in pieces], dtype=np.int64)
        first = trained.cumsum() - trained
        ids = np.zeros((int(trained.sum()), self._manner.k), dtype=np.int64)
        logprobs = np.zeros(ids.shape, dtype=np.float32)
        order = sorted(np.flatnonzero(trained).tolist(), key=lambda place: -windows[place].length)  # little padding
        for start in range(0, len(order), self._manner.batch):
            places = order[start : start + self._manner.batch]
            found = _likeliest(model, [pieces[place] for place in places], self._entries, self._manner.k)
            for place, (top, values) in zip(places, found, strict=True):
                if not np.isfinite(values).all():
                    raise TeacherError(f"the teacher's logits of document {windows[place].document} are no numbers: "
                                       "try --dtype fp32")  # fmt: skip
                span = slice(first[place], first[place] + trained[place])
                ids[span], logprobs[span] = top, values
        return ids, logprobs

    @functools.cached_property
    def _model(self) -> "torch.nn.Module":
        """The teacher, loaded when it is first needed."""
        import torch

        device, dtype = self._manner.device, getattr(torch, DTYPES[self._manner.dtype])
        if device == "cpu":  # a sum is another one on more threads, and so would be the bytes
            torch.set_num_threads(1)
        model = checkpoints.load_model(self._teacher, device, context=self._manner.context, dtype=dtype)[0]
        self._began = self._told = time.monotonic()
        return model

    def _line(self) -> str:
        """How far all processes have come, and how fast this one is."""
        done = sum(self.parts.path(number).exists() for number in range(len(self.plan)))
        pace = self._read / (time.monotonic() - self._began)
        left = sum(int(self._tokens[part.split].lengths[part.first : part.last].sum())
                   for number, part in enumerate(self.plan) if not self.parts.path(number).exists())  # fmt: skip
        return f"{done}/{len(self.plan)} parts  {compact(pace)} tok/s  eta {duration(left / pace)} with one process"


def _plan(split: str, tokens: "TokenShards") -> Iterator[Part]:
    """The parts of a split: whole documents of one shard, some PART_TOKENS tokens each."""
    before = 0
    for shard, lengths in enumerate(tokens.shard_lengths):
        ends, first = lengths.cumsum(), 0
        while first < len(lengths):
            begun = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, begun + PART_TOKENS, side="right")))
            yield Part(split, shard, before + first, before + last)
            first = last
        before += len(lengths)


def _windows(tokens: "TokenShards", part: Part, context: int) -> Iterator[Window]:
    """The documents of a part, cut where they are longer than the context, as packing would."""
    for document in range(part.first, part.last):
        length = int(tokens.lengths[document])
        for offset in range(0, length, context):
            yield Window(document, offset, min(context, length - offset))


def _likeliest(
    model: "torch.nn.Module", pieces: Sequence[tuple[np.ndarray, np.ndarray]], entries: int, k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, log-probabilities in fp32), [trained, k] each, of each of (inputs, labels): the model reads all in one
    batch, padded behind, where no token sees it; of its logits the first `entries` count."""
    import torch

    from models.kernels.ignored import IGNORE

    device = model.head_weight.device
    longest = max(len(inputs) for inputs, _ in pieces)
    input_ids = np.zeros((len(pieces), longest), dtype=np.int64)
    trained = np.zeros((len(pieces), longest), dtype=bool)
    for row, (inputs, labels) in enumerate(pieces):
        input_ids[row, : len(inputs)] = inputs
        trained[row, : len(labels)] = labels != IGNORE
    with torch.no_grad(), _memory(len(pieces)):
        hidden = model.hidden_states(torch.from_numpy(input_ids).to(device))[torch.from_numpy(trained).to(device)]
        head = model.head_weight[:entries]
        chunk = max(64, LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cpu"]) // entries)
        tops = [(part @ head.T).float().log_softmax(dim=-1).topk(k) for part in hidden.split(chunk)]
    ids, logprobs = (torch.cat(found).cpu().numpy() for found in ([top.indices for top in tops],
                                                                  [top.values for top in tops]))  # fmt: skip
    ends = trained.sum(axis=1).cumsum()[:-1]
    return list(zip(np.split(ids, ends), np.split(logprobs, ends), strict=True))


@contextlib.contextmanager
def _memory(rows: int) -> Iterator[None]:
    """Around what may need more memory than the device has."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise TeacherError(f"{rows} windows at once need more memory than the device has: lower --batch, or --context, "
                           "which gives other scores") from error  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number, 1 or more")
    return int(text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder shards/NAME-FINGERPRINT")
    parser.add_argument("--teacher", required=True, metavar="T", help="a run, a Hugging Face folder or hub:OWNER/NAME")
    parser.add_argument("--k", type=_positive, default=16, help="entries a token (%(default)s)")
    parser.add_argument("--batch", type=_positive, default=8, metavar="N", help="documents at once (%(default)s)")
    parser.add_argument("--context", type=_positive, default=CONTEXT, metavar="N",
                        help="tokens of a document at once; the teacher's own context, if it is less (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of its weights: bf16 on a GPU, else fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto: each process its own GPU, else the CPU")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    say: Say = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    manner = Manner(args.k, args.batch, args.context, args.dtype, args.device)
    try:
        score(args.shards, args.teacher, manner, rank, processes, say)
    except WrongArgument as error:
        print(error, file=sys.stderr)
        return 2
    except (ScoreError, TeacherError, CheckpointError, TokenizerError) as error:
        print(f"not scored: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"not scored: {error}: make room or make it writable; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interruption.MESSAGE, file=sys.stderr)
        return interruption.INTERRUPTED
    return 0


if __name__ == "__main__":
    process.outlive_readers()
    interruption.interrupt_once()
    process.leave(main())
