"""Processes that share the work of a preparation: results in order, as many at once as there are cores."""

import errno
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from machine import process


class Workers:
    """A pool that is started when it is first worth it; a context manager.

    Args:
        processes: None: one a core.
    """

    def __init__(self, processes: int | None = None):
        self.processes = processes or process.usable_cores()
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple], many: bool) -> Iterator[Any]:
        """`function(*job)` of each job, in order; `many`: whether they are worth processes of their own.

        Jobs are taken from the iterable a few ahead of the results, so it may end early.

        Raises:
            OSError: ENOMEM: a worker was killed, most likely for want of memory.
        """
        if not many or self.processes == 1:
            for job in jobs:
                yield function(*job)
            return
        waiting: deque = deque()
        jobs = iter(jobs)
        try:
            while True:
                for job in itertools.islice(jobs, 2 * self.processes - len(waiting)):
                    waiting.append(self._submit(function, job))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            self._pool = None
            raise OSError(errno.ENOMEM, "a process that was preparing data was killed, most likely for want of memory: "
                          "use fewer with data.workers; what is done so far is kept") from error  # fmt: skip
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable[..., Any], job: tuple) -> Future:
        if self._pool is None:  # spawned: a fork would inherit the locks of whatever threads this process has
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_begin)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as it stays in a worker that starts now
        try:
            return self._pool.submit(function, *job)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _begin() -> None:
    """Of each worker: Ctrl-C is the parent's affair, and without a parent there is nothing to do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process.end_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
