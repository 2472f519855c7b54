"""Work that is cut into parts, a verified folder each, and shared by any number of processes that do not talk.

Each process walks over all parts from an offset of its own, passes by what is there and what somebody else holds, and
takes the rest, part by part, with a file lock that the system lets go of when its holder dies. A part that is there and
verifies is never written again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from storage import folder

PAUSE = 0.5  # seconds, before looking again at parts that others hold

Say = Callable[[str], object]


class Parts:
    """The folders 00000, 00001, ... below `root`; `noun` is what people call one."""

    def __init__(self, root: Path, noun: str):
        self.root, self._noun = root, noun
        self._verified: set[int] = set()

    def path(self, number: int) -> Path:
        """Where a part lies, or will."""
        return self.root / f"{number:05d}"

    def is_there(self, number: int) -> bool:
        """Whether a part is written and verifies."""
        if number not in self._verified and self.path(number).exists() and not folder.verify(self.path(number)):
            self._verified.add(number)
        return number in self._verified

    def complete(self, numbers: list[int], offset: int, make: Callable[[int], None], say: Say) -> None:
        """Call `make` for each part of `numbers` that is not there, unless another process does it; return when all
        are there.

        Args:
            offset: where in `numbers` to begin; processes that begin at different places seldom meet.
            make: writes the part of a number. What it raises ends the walk, and another process may take that part.
        """
        left = numbers[offset % len(numbers) :] + numbers[: offset % len(numbers)] if numbers else []
        told = False
        while left := self._pass(left, make, say):
            if not told:
                say(f"waiting for {len(left)} {self._noun}s that other processes are making")
                told = True
            time.sleep(PAUSE)

    def _pass(self, numbers: list[int], make: Callable[[int], None], say: Say) -> list[int]:
        """Once over `numbers`; returns those that others hold."""
        held = []
        for number in numbers:
            if self.is_there(number):
                continue
            with self._claimed(number) as mine:
                if not mine:
                    held.append(number)
                    continue
                if self.is_there(number):  # it was finished between the look and the claim
                    continue
                path = self.path(number)
                if path.exists():
                    fault = folder.verify(path)[0]
                    say(f"WARNING: {fault}: moved to {folder.set_aside(path)}, the {self._noun} is made again")
                make(number)
        return held

    @contextlib.contextmanager
    def _claimed(self, number: int) -> Iterator[bool]:
        """Whether this process is the one that may write a part while the block runs."""
        path = self.path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_name(f".lock-{path.name}"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
