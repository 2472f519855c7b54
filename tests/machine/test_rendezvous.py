"""Processes that wait for one that does not come: who is missing is said, signals are heard, the wait has an end."""

import datetime
import functools
import os
import signal
import socket
import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from evaluation import asking, command
from machine.rendezvous import Missing, meet
from tests import warm


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def launched(monkeypatch):
    """launched(rank, ...): this process is that one of a launch of two on one machine; returns the port."""

    def launched(rank: int, port: int | None = None, **more: str) -> int:
        port = port or free_port()
        given = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=port)  # fmt: skip
        for name, value in {**given, **more}.items():
            monkeypatch.setenv(name, str(value))
        return port

    return launched


def test_newcomer_a_process_whose_partner_never_comes_says_so_after_seconds_and_hears_signals(tiny):
    """In real trainings, started as by a launcher, one of which has the place where the others are to meet."""
    processes = []
    for rank, number in ((0, signal.SIGTERM), (1, signal.SIGINT)):
        places = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=free_port())  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in places.items()}}
        command = [sys.executable, "multigpu_train.py", *tiny(f"rank-{rank}")]
        process = warm.Popen(command, env=environment, text=True, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        processes.append((process, number))
    said = ["rank 1 (machine 1) of 2 has not come", "nobody answers at 127.0.0.1:"]
    for (process, number), expected in zip(processes, said, strict=True):
        lines = []
        for line in process.stdout:
            lines.append(line)
            if expected in line:
                break
        process.send_signal(number)
        try:
            rest, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        assert process.returncode == 75, [*lines, rest]


def test_newcomer_the_wait_ends_and_names_who_is_missing(launched):
    launched(0)
    with pytest.raises(Missing, match=r"after 0\.001 minutes rank 1 of 2 has not come: do this"):
        meet(0.001, remedy="do this")
    launched(1, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    with pytest.raises(Missing, match=r"nobody answers at 127\.0\.0\.1:\d+, where rank 0 \(machine 0\) should be"):
        meet(0.001)


def test_newcomer_an_evaluation_does_not_wait_for_ever_either(launched, monkeypatch, capsys):
    launched(0)
    monkeypatch.setattr(asking, "meet", functools.partial(meet, 0.001))
    assert command.run(None, lambda *_: pytest.fail("it began alone"), str) == 1
    assert "rank 1 of 2 has not come" in capsys.readouterr().err


def test_whoever_leaves_is_not_counted_on(launched):
    port = free_port()
    store = TCPStore("127.0.0.1", port, None, True, datetime.timedelta(seconds=30))
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the launcher's store, as `accelerate launch` has it
    launched(1, port, **agent)
    with pytest.raises(KeyboardInterrupt):
        meet(stop=lambda: True)
    launched(0, port, **agent)
    with pytest.raises(Missing, match="rank 1 of 2"):
        meet(0.001)
    store.set("met/0/1", "here")
    assert meet(stop=lambda: True) is not None  # all are here: what was asked is for all of them to agree on
    launched(0, port, **agent, TORCHELASTIC_RESTART_COUNT="1")
    with pytest.raises(Missing, match="rank 1 of 2"):
        meet(0.001)  # that word was of the attempt before


def test_a_port_that_is_taken_is_named(launched):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        launched(0, taken.getsockname()[1])
        with pytest.raises(Missing, match=rf"port {taken.getsockname()[1]} of this machine cannot be had"):
            meet(1)


def test_a_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert meet() is None
