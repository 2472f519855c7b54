"""Asking a model many prompts: sorted by length, in batches that are fixed beforehand, shared by all processes.

Which prompts make a batch depends on the prompts alone, never on how many processes there are, so neither do the
answers. `python` alone is one process; a launcher that sets RANK and WORLD_SIZE (accelerate launch, torchrun) makes
several, which meet only at the end, to exchange what was said.
"""

import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from machine.rendezvous import meet
from models.inference.sampling import Sampling

if TYPE_CHECKING:
    from torch import nn

    from tokenizer import Tokenizer

GREEDY = Sampling(temperature=0.0)
PATIENCE = datetime.timedelta(days=1)  # of a process that is done, with those that are not
_LAG = 16  # tokens behind the others: a row that is so far behind has ended, as tokens may come a few at a time
_TAIL = 32  # last tokens of an answer in which a stop text is looked for
PROGRESS_SECONDS = 30
Log = Callable[[str], object]


@dataclass(frozen=True)
class Reply:
    """What the model said: `stop`, it ended by itself; `length`, it was cut; `no_room`, the context is full."""

    text: str
    finish: Literal["stop", "length", "no_room"]
    tokens: int  # of the answer, without the token that ends it


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this one writes and talks."""
        return self.rank == 0

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all processes have, by id; each gets all of it."""
        if self.world == 1:
            return mine
        import torch.distributed

        parts: list[dict[int, Any]] = [{}] * self.world
        torch.distributed.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}


ALONE = Processes()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """The processes that a launcher has started, in a process group of their own (gloo).

    Raises:
        machine.rendezvous.Missing: not all of them have come.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    import torch.distributed

    _store = meet()  # held until torch has opened it too
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        torch.distributed.destroy_process_group()


class WrongDevice(ValueError):
    """A device that this machine does not have."""


def device_of(wanted: str | None, group: Processes) -> str:
    """The device of this process: `wanted`, else a GPU of its own where there are any, else the CPU.

    Raises:
        WrongDevice: `wanted` cannot be used.
    """
    import torch

    if wanted is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{group.local_rank % gpus}" if gpus else "cpu"
    try:
        torch.zeros(1, device=wanted).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on what is not there
        raise WrongDevice(f"--device {wanted} cannot be used: {str(error).splitlines()[0]}") from error
    return wanted


class Progress:
    """Tells every half minute how far the first process is, as the others are about as far."""

    def __init__(self, told: str, group: Processes, log: Log):
        self.told, self.group, self.log = told, group, log
        self.began = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """So many of this process's prompts are done."""
        now = time.monotonic()
        if self.group.is_main and now - self.last >= PROGRESS_SECONDS and done < total:
            left = (now - self.began) / done * (total - done)
            self.log(f"{self.told}: {done / total:.0%}, {left / 60:.0f} min left")
            self.last = now


def ask(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    stop_text: str | None = None,
    never: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    batch: int = 32,
    group: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """The model's reply to each prompt (token ids), in their order; every process of `group` gets all of them.

    Args:
        stop_ids: tokens that end a reply. stop_text: so does this text; neither is part of the reply.
        never: tokens that are not drawn (checkpoints.never_drawn).
        seeds: of the draws, one a prompt; needed where the temperature is not 0.
        batch: rows that are decoded together.
        progress: called with (prompts done by this process, all that it has) after each batch; it may raise.
    """
    if sampling.temperature != 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("draws need a seed for each prompt")
    replies: dict[int, Reply] = {}
    mine = batches(prompts, batch)[group.rank :: group.world]
    for rows in mine:
        fitting = [row for row in rows if len(prompts[row]) < model.config.context]
        said = _continued(model, tokenizer, [prompts[row] for row in fitting], max_new_tokens, stop_ids, stop_text,
                          never, sampling, None if seeds is None else [seeds[row] for row in fitting])  # fmt: skip
        replies |= {row: Reply("", "no_room", 0) for row in rows} | dict(zip(fitting, said, strict=True))
        if progress:
            progress(len(replies), sum(map(len, mine)))
    everything = group.gather(replies)
    return [everything[row] for row in range(len(prompts))]


def batches(prompts: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """The prompts' numbers in batches of prompts of about one length, the longest first, as they may fill memory."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    return [order[first : first + batch] for first in range(0, len(order), batch)]


def seed_of(seed: int, *key: object) -> int:
    """A seed for one draw, from 0 to 2^63 - 1: a function of the whole evaluation's seed and what is drawn."""
    digest = hashlib.blake2b("\0".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _continued(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    stop_text: str | None,
    never: Sequence[int],
    sampling: Sampling,
    seeds: list[int] | None,
) -> list[Reply]:
    """Replies of one batch, all of whose prompts fit."""
    from models.inference.decoding import generate

    watched = _Watched(tokenizer, stop_text, len(prompts))
    with contextlib.suppress(_AllStopped):
        generate(model, prompts, max_new_tokens, stop_ids, sampling, watched.token, tokenizer.vocab_size, seeds=seeds,
                 never=never)  # fmt: skip
    room = [min(max_new_tokens, model.config.context - len(prompt)) for prompt in prompts]
    return [watched.reply(row, most) for row, most in enumerate(room)]


class _AllStopped(Exception):
    """Every row has come to the stop text or ended: the batch need not go on."""


class _Watched:
    """The rows of a batch as their tokens come; ends it as soon as no row has anything more to say."""

    def __init__(self, tokenizer: "Tokenizer", stop_text: str | None, rows: int):
        self.tokenizer, self.stop_text = tokenizer, stop_text
        self.ids: list[list[int]] = [[] for _ in range(rows)]  # up to the stop text
        self.drawn = [0] * rows  # tokens so far, those behind the stop text too
        self.stopped = [False] * rows

    def token(self, row: int, token: int) -> None:
        """Take in one more token of a row."""
        self.drawn[row] += 1
        if self.stop_text is None or not self.stopped[row]:
            self.ids[row].append(token)
        if self.stop_text is None:
            return
        self.stopped[row] = self.stopped[row] or self.stop_text in self.tokenizer.decode(self.ids[row][-_TAIL:])
        oldest = self.drawn[row] - _LAG
        if self.stopped[row] and all(
            stopped or drawn < oldest for stopped, drawn in zip(self.stopped, self.drawn, strict=True)
        ):
            raise _AllStopped

    def reply(self, row: int, most: int) -> Reply:
        """What the row said, of at most so many tokens."""
        ids, text = self.ids[row], self.tokenizer.decode(self.ids[row])
        finish = "stop" if self.stopped[row] or len(ids) < most else "length"
        if self.stop_text is not None:
            text = text.partition(self.stop_text)[0]
        return Reply(text, finish, len(ids))
