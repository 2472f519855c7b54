"""Where the processes of a launch find each other before anything waits for all of them at once.

torch's own rendezvous waits in C++: a process whose partner never comes says nothing there and hears no signal. `meet`
goes first. It knows the same places (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as accelerate, torchrun or a person
have set them) and the same store, but waits in steps of a fraction of a second, tells who is missing, and ends when it
is asked to. Only then may torch make a process group.
"""

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

MINUTES = 10.0
_STEP = 0.1  # seconds between two looks
_FIRST_WORD = 5.0  # seconds after which it is said who is missing; imports alone may take as long
_NEXT_WORD = 30.0
_ANSWER = 5.0  # seconds for one answer of a store that has accepted a connection


class Missing(RuntimeError):
    """Not all processes of the launch have come; the message names those that have not."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the launch, as the environment has it."""

    rank: int
    world: int
    local_rank: int
    local_world: int  # processes of each machine
    address: str
    port: int
    attempt: str  # how often a launcher has started all of them again
    hosts: bool  # whether the store is this process's; else the launcher's, or the first process's

    @classmethod
    def here(cls) -> "Place":
        """Of this process; accelerate's defaults where nothing is said."""
        number = lambda name, default: int(os.environ.get(name) or default)  # noqa: E731
        rank, world = number("RANK", 0), number("WORLD_SIZE", 1)
        return cls(
            rank, world, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", world),
            os.environ.get("MASTER_ADDR") or "127.0.0.1", number("MASTER_PORT", 29500),
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        )  # fmt: skip

    def key(self, rank: int) -> str:
        """Under which a process says in the store that it is here."""
        return f"met/{self.attempt}/{rank}"

    def name(self, rank: int) -> str:
        """What people call a process."""
        return f"rank {rank}" + (f" (machine {rank // self.local_world})" if self.local_world < self.world else "")


def meet(
    minutes: float = MINUTES,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    remedy: str = "start what is missing, or look at its output",
) -> "TCPStore | None":
    """Wait until all processes of the launch are here; None where there is only this one.

    Hold the result until torch has made its process group: the store's server may be in this process, and torch goes on
    with it.

    Args:
        minutes: how long to wait at most.
        stop: asked again and again; when it is true, the wait is over.
        say: takes a line about who is missing.
        remedy: what the error says to do.

    Raises:
        Missing: not all have come in time, or the port is taken.
        KeyboardInterrupt: `stop` was true while some had not come.
    """
    place = Place.here()
    if place.world == 1:
        return None
    began = time.monotonic()
    next_word = began + _FIRST_WORD
    store: TCPStore | None = None
    try:
        while True:
            if store is None:
                store = _open(place)
            missing = _missing(store, place) if store is not None else None
            if missing == []:
                return store
            if missing is None:
                store = None  # gone since, with what this process has said there
            if stop():
                raise KeyboardInterrupt
            now = time.monotonic()
            if now - began >= 60 * minutes:
                raise Missing(f"after {minutes:g} minutes {_told(missing, place)}: {remedy}")
            if now >= next_word:
                next_word = now + _NEXT_WORD
                if _speaks(missing, place):
                    say(f"waiting for all {place.world} processes: {_told(missing, place)}")
            time.sleep(_STEP)
    except BaseException:  # a signal's too
        _leave(store, place)
        raise


def _open(place: Place) -> "TCPStore | None":
    """The store, with word in it that this process is here; None where nobody answers yet."""
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore

    answer = timedelta(seconds=_ANSWER)
    if place.hosts:
        try:
            store = TCPStore(place.address, place.port, None, True, answer, wait_for_workers=False, multi_tenant=True)
        except DistError as error:
            raise Missing(
                f"port {place.port} of this machine cannot be had, over which the processes are to meet "
                f"({str(error).splitlines()[0]}): end whoever has it, or name another with --main_process_port"
            ) from None
    else:
        try:  # before torch does, which would wait in C++
            socket.create_connection((place.address, place.port), timeout=1).close()
            store = TCPStore(place.address, place.port, None, False, answer, wait_for_workers=False)
        except (OSError, DistError):
            return None
    try:
        store.set(place.key(place.rank), "here")
    except DistError:
        return None
    return store


def _missing(store: "TCPStore", place: Place) -> list[int] | None:
    """Ranks that have not come; None where the store is gone."""
    from torch.distributed import DistError

    try:
        if store.check([place.key(rank) for rank in range(place.world)]):
            return []
        return [rank for rank in range(place.world) if not store.check([place.key(rank)])]
    except DistError:
        return None


def _leave(store: "TCPStore | None", place: Place) -> None:
    """Take back the word that this process is here, so that nobody counts on it."""
    from torch.distributed import DistError

    try:
        if store is not None:
            store.delete_key(place.key(place.rank))
    except DistError:
        pass


def _speaks(missing: list[int] | None, place: Place) -> bool:
    """One process of each machine does, and the first that has come."""
    if place.local_rank == 0:
        return True
    return missing is not None and place.rank == min(set(range(place.world)) - set(missing))


def _told(missing: list[int] | None, place: Place) -> str:
    if missing is None:
        return f"nobody answers at {place.address}:{place.port}, where {place.name(0)} should be"
    names = ", ".join(place.name(rank) for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
    return f"{names} of {place.world} {'has' if len(missing) == 1 else 'have'} not come"
