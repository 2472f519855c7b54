"""A teacher on vLLM that is started for the job: `vllm serve`, one process a GPU, ended with the job however that ends.

vLLM pins other versions of torch and transformers than this project, so it lives in an environment of its own
(`make teacher` builds .venv-teacher) and is spoken to by HTTP, like any other server (endpoint.py). Each process has a
GPU to itself: vLLM's own data parallelism ties processes together, and one that fails takes the others with it.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from distill.teachers import Answer, Request, TeacherError, watched
from distill.teachers.endpoint import Endpoint
from models.inference.sampling import Sampling
from storage import folder

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-teacher"
_TAIL = 20  # lines of a server's log that an error shows
_EVERY = 0.25  # seconds between two questions whether a server is ready
# What a launcher says to its ranks: a server that inherits it takes itself for one of them and waits for the others.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "ACCELERATE_")
# Paths of our environment; keys that the servers here neither need nor may ask for.
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OPENAI_API_KEY", "VLLM_API_KEY")


class Vllm:
    """The teacher `model`, by servers that the first answer starts and `close` ends.

    Args:
        model: OWNER/NAME of the Hub, or a folder in the Hub's layout.
        revision: of the model at the Hub; None asks the Hub for today's.
        context: positions of a conversation, prompt and answer together; less of it leaves memory for more rows.
        executable: of vLLM; None takes .venv-teacher/bin/vllm, else the `vllm` on PATH.
        gpus: as CUDA_VISIBLE_DEVICES names them; None takes all, and each process of a launcher its share of them.
        concurrency: requests in flight at each server.
        options: more words for `vllm serve`, such as --quantization; they count as part of what decides the answers.
        start_seconds: until all servers must be ready; the first time they download the model.
        log_folder: where the servers' logs go; None for a temporary one, which is kept if something went wrong.
        allow, timeout_seconds, tries, backoff_seconds, say: as for Endpoint.

    Raises:
        TeacherError: there is no vLLM, or no such model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        context: int = 2048,
        executable: str | Path | None = None,
        gpus: Sequence[str | int] | None = None,
        concurrency: int = 128,
        options: Sequence[str] = (),
        start_seconds: float = 1800.0,
        log_folder: str | Path | None = None,
        allow: Sequence[str] = (),
        timeout_seconds: float = 600.0,
        tries: int = 10,
        backoff_seconds: float = 1.0,
        say: Callable[[str], None] = print,
    ):
        self._executable = _found(executable)
        self._identity = _identity(str(model), revision)
        self._options, self._context, self._allow = list(options), context, sorted(set(allow))
        self._gpus, self._concurrency, self._say = gpus, concurrency, say
        self._start_seconds, self._log_folder = start_seconds, log_folder
        self._model = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
        self._client_settings = {"allow": allow, "timeout_seconds": timeout_seconds, "tries": tries,
                                 "backoff_seconds": backoff_seconds, "say": say}  # fmt: skip
        self._servers: list[_Server] = []
        self._client: Endpoint | None = None

    def answer(self, requests: Sequence[Request], sampling: Sampling, max_new_tokens: int) -> list[Answer]:
        """As an Endpoint's; the first call starts the servers.

        Raises:
            TeacherError: also if a server does not start, or has ended; with the end of its log.
        """
        return self._started().answer(requests, sampling, max_new_tokens) if requests else []

    def about(self) -> dict[str, Any]:
        return {"engine": "vllm", **self._identity, "dtype": "bfloat16", "options": self._options,
                "allow": self._allow, "template": "the model's own"}  # fmt: skip

    def versions(self) -> dict[str, Any]:
        """As an Endpoint's; starts the servers."""
        return {**self._started().versions(), "engine": "vllm", "dtype": "bfloat16"}

    def close(self) -> None:
        """End the servers; a second time does nothing."""
        if self._client is not None:
            self._client.close()
        for server in self._servers:
            server.ask_to_end()
        for server in self._servers:
            server.wait()
        if self._servers and self._log_folder is None and not any(server.failed for server in self._servers):
            shutil.rmtree(self._servers[0].log.parent, ignore_errors=True)
        self._servers, self._client = [], None

    def _started(self) -> Endpoint:
        if self._client is None:
            try:
                self._start()
            except BaseException:  # a Ctrl-C too: nothing is left behind
                self.close()
                raise
        self._check()
        return self._client

    def _start(self) -> None:
        gpus = _own_gpus(self._gpus)
        logs = Path(self._log_folder or tempfile.mkdtemp(prefix="vllm-"))
        logs.mkdir(parents=True, exist_ok=True)
        self._say(f"starting {len(gpus)} of {self._executable} serve {self._identity['model']}, logs in {logs}")
        start = time.monotonic()
        for gpu, port in zip(gpus, _free_ports(len(gpus)), strict=True):
            self._servers.append(_Server(self._command(port), gpu, port, logs))
        for server in self._servers:
            server.await_health(start + self._start_seconds, self._check)
        self._say(f"ready after {time.monotonic() - start:.0f} seconds")
        self._client = Endpoint(
            [server.url for server in self._servers], self._identity["model"], api_key_env=None,
            concurrency=self._concurrency * len(gpus), check=self._check, **self._client_settings,
        )  # fmt: skip

    def _check(self) -> None:
        for server in self._servers:
            server.check()

    def _command(self, port: int) -> list[str]:
        """How a server is started. Without `--generation-config vllm` the model's recommendations would stand in for
        every parameter that a request leaves out."""
        revision = self._identity.get("revision")
        revisions = ["--revision", revision, "--tokenizer-revision", revision] if revision else []
        return [self._executable, "serve", self._model, "--served-model-name", self._identity["model"], *revisions,
                "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--generation-config", "vllm",
                "--max-model-len", str(self._context), *self._options]  # fmt: skip


class _Server:
    """One `vllm serve` and the process that watches over it."""

    def __init__(self, command: list[str], gpu: str | None, port: int, logs: Path):
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.log = logs / f"vllm-{port}.log"
        self.failed = False
        self._name = "vllm" if gpu is None else f"vllm on GPU {gpu}"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(watched.__file__).resolve()), *command],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=logs, env=_environment(command[0], gpu),
                start_new_session=True,
            )  # fmt: skip

    def await_health(self, deadline: float, check: Callable[[], None]) -> None:
        """Return when it is ready.

        Args:
            deadline: of time.monotonic().
            check: raises as soon as any of the servers has ended.

        Raises:
            TeacherError: it is not ready by then.
        """
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while True:
                check()
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"{self.root}/health").status_code == 200:
                        return check()
                if time.monotonic() > deadline:
                    raise self._error("is not ready in time (start_seconds)")
                time.sleep(_EVERY)

    def check(self) -> None:
        """Raises TeacherError if it has ended by itself."""
        if (code := self._process.poll()) is not None:
            raise self._error(f"has ended (exit code {code})")

    def ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * watched.GRACE)

    def _error(self, what: str) -> TeacherError:
        self.failed = True
        lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_TAIL:]
        return TeacherError("\n    ".join([f"{self._name} {what}; the end of {self.log}:", *(lines or ["(empty)"])]))


def _found(executable: str | Path | None) -> str:
    """The absolute path of vLLM's executable."""
    if executable is None and (ENVIRONMENT / "bin" / "vllm").is_file():
        executable = ENVIRONMENT / "bin" / "vllm"
    path = shutil.which(str(executable or "vllm"))
    if path is None:
        raise TeacherError(f"there is no vLLM at {executable or '.venv-teacher, nor on PATH'}: build its environment "
                           "with `make teacher`, or name its executable")  # fmt: skip
    return os.path.abspath(path)  # not resolved: an environment's links say which environment it is


def _identity(model: str, revision: str | None) -> dict[str, str]:
    """What the model is, on whatever machine: name and revision at the Hub, or name and digest of a folder."""
    path = Path(model)
    if path.is_dir():
        files = sorted(file for pattern in ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
                       for file in path.glob(pattern))  # fmt: skip
        if not any(file.suffix == ".safetensors" for file in files):
            raise TeacherError(f"{model} holds no weights: there is no *.safetensors")
        sums = "\n".join(f"{file.name} {folder.sha256(file)}" for file in files)
        return {"model": path.resolve().name, "digest": hashlib.sha256(sums.encode()).hexdigest()}
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise TeacherError(f"{model} is no folder: name one, or OWNER/NAME of the Hub")
    return {"model": model, "revision": revision or _newest_revision(model)}


def _newest_revision(model: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().model_info(model).sha)
    except Exception as error:  # noqa: BLE001  whatever the Hub's client raises, what is missing is the revision
        reason = " ".join(str(error).split())
        raise TeacherError(f"the Hub does not tell the revision of {model} ({reason}): name it in `revision`") from None


def _own_gpus(gpus: Sequence[str | int] | None) -> list[str | None]:
    """This process's GPUs, a server each; [None] where no GPU is known, and vLLM is left to find something.

    Raises:
        TeacherError: a launcher started more processes than there are GPUs.
    """
    if gpus is None:
        gpus = _visible_gpus()
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    own = [str(gpu) for gpu in gpus][rank::ranks]
    if gpus and not own:
        raise TeacherError(f"there are {len(gpus)} GPUs for {ranks} processes: start as many processes as GPUs, or one")
    return own or [None]


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _environment(executable: str, gpu: str | None) -> dict[str, str]:
    """What a server gets to see of our environment."""
    kept = {name: value for name, value in os.environ.items()
            if name not in (*_LAUNCHER, *_OURS) and not name.startswith(_LAUNCHER_PREFIXES)}  # fmt: skip
    # Kernels are built at its start, by tools that lie beside the executable.
    kept["PATH"] = os.pathsep.join([os.path.dirname(executable), kept.get("PATH", os.defpath)])
    return kept if gpu is None else {**kept, "CUDA_VISIBLE_DEVICES": gpu}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
