"""Commands of this project without the seconds in which Python imports torch: each runs in a process of its own, forked
from one that has imported the libraries, but nothing of the project, once for all tests of a worker.

For tests in which a process is the point (its signals, exit codes, output, its death) and its first imports are not.
What Python does before the command begins is left out: test those with `subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [
    "torch", "torch._dynamo", "torch._inductor.utils", "torch.distributed.device_mesh", "torch.distributed.fsdp",
    "torch.nn.attention.flex_attention", "torch.nn.parallel", "torch.utils.checkpoint",
    "accelerate", "filelock", "jinja2", "matplotlib.backends.backend_svg", "matplotlib.figure", "numpy", "pyarrow",
    "pyarrow.compute", "pyarrow.json", "pyarrow.parquet", "pydantic", "safetensors.torch", "sqlite3", "tokenizers",
    "yaml",
]  # fmt: skip

_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(LIBRARIES)


class Popen:
    """`subprocess.Popen`, as far as tests use it, of a command that begins with `sys.executable` and names a script,
    `-m module` or `-c program`."""

    def __init__(
        self, command: list[Any], cwd: Path | str = ROOT, env: dict[str, str] | None = None, stdin: Any = None,
        stdout: Any = None, stderr: Any = None, text: bool = False, start_new_session: bool = False,
    ):  # fmt: skip
        python, *arguments = (os.fsdecode(part) if isinstance(part, bytes | Path) else str(part) for part in command)
        assert python == sys.executable, f"{python} is no command for this"
        self.args, self.returncode = command, None
        ours: list[IO | None] = []
        theirs: list[int] = []
        for number, given in enumerate((stdin, stdout, stderr)):
            mine = None
            if given is subprocess.PIPE:
                reading, writing = os.pipe()
                there, here = (reading, writing) if number == 0 else (writing, reading)
                mine = os.fdopen(here, ("w" if number == 0 else "r") + ("" if text else "b"))
            elif given is subprocess.STDOUT:
                there = os.dup(theirs[1])
            elif given is subprocess.DEVNULL:
                there = os.open(os.devnull, os.O_RDWR)
            else:
                there = os.dup(number if given is None else given if isinstance(given, int) else given.fileno())
            ours.append(mine)
            theirs.append(there)
        self.stdin, self.stdout, self.stderr = ours
        environment = dict(os.environ if env is None else env)
        given = (arguments, str(cwd), environment, [_Inherited(descriptor) for descriptor in theirs], start_new_session)
        self._process = _servers.Process(target=_run, args=given)
        self._process.start()
        for descriptor in theirs:
            os.close(descriptor)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        said: dict[str, Any] = {}
        streams = {"out": self.stdout, "err": self.stderr}
        readers = [
            threading.Thread(target=lambda name=name, stream=stream: said.update({name: stream.read()}), daemon=True)
            for name, stream in streams.items() if stream
        ]  # fmt: skip
        for reader in readers:
            reader.start()
        if self.stdin:
            if input:
                self.stdin.write(input)
            self.stdin.close()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        return said.get("out"), said.get("err")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *command: Any, cwd: Path | str = ROOT, timeout: float = 300, input: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`run` of conftest.py, in such a process."""
    process = Popen(
        [*command], cwd, {**os.environ, **environment}, subprocess.DEVNULL if input is None else subprocess.PIPE,
        subprocess.PIPE, subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(input, timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ranks(
    count: int, *command: Any, cwd: Path | str | list[Path] = ROOT, timeout: float = 300, **environment: str
) -> list[tuple[int, str]]:
    """(exit code, output) of each of `count` processes, which know of each other as if a launcher had started them. A
    folder for each: each is the only one of a machine."""
    machines = isinstance(cwd, list)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": 1 if machines else count, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    started = []
    for rank in range(count):
        given = {**common, "RANK": rank, "LOCAL_RANK": 0 if machines else rank}
        env = {**os.environ, **{name: str(value) for name, value in given.items()}, **environment}
        started.append(Popen([*command], cwd[rank] if machines else cwd, env, subprocess.DEVNULL, subprocess.PIPE,
                             subprocess.STDOUT, text=True))  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


class _Inherited:
    """A file descriptor that a process takes along."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __reduce__(self):
        return _detached, (reduction.DupFd(self.descriptor),)


def _detached(duplicate) -> int:
    return duplicate.detach()


def _run(arguments: list[str], cwd: str, environment: dict[str, str], streams: list[int], new_session: bool) -> None:
    """As Python would begin with these arguments."""
    if new_session:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = arguments
    if first in ("-m", "-c"):
        sys.argv, place = [first, *rest[1:]], os.getcwd()
    else:
        sys.argv, place = arguments, str(Path(first).resolve().parent)
    here = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [place, *here, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
