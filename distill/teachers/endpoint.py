"""A teacher behind HTTP: any server that speaks OpenAI's chat API (vLLM, SGLang, llama.cpp, hosted ones).

Each request asks for one answer with its own seed; a bounded number are in flight. The job never trusts a server's
word: what it relies on is tried out first (probe.py), and a server that fails is refused by name.
"""

import asyncio
import datetime
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from distill.teachers import Answer, Request, TeacherError
from distill.teachers.chat_api import ChatServer, Manners, Rejected, Reply, Unanswered
from distill.teachers.probe import faults
from models.inference.sampling import Sampling

ALLOWABLE = ("seed", "top_k", "min_p", "usage", "finish_reason")
_LISTED = 10  # models that a message names


class Endpoint:
    """The teacher `model` as the server at `url` answers for it.

    A server may lay its own defaults under what a request leaves out, so temperature, top_p and max_tokens are always
    sent. top_k, min_p and repetition_penalty are extensions that some servers reject, and are sent only where they
    are set: a vLLM that you start yourself needs `--generation-config vllm`, or it fills them in from the model's own
    recommendations.

    Args:
        url: http(s)://HOST[:PORT][/v1]; several are servers of the same model, which share the requests.
        api_key_env: the environment variable that holds the key, if it is set; None sends none.
        concurrency: requests in flight, at most.
        allow: what the server may lack: seed, top_k, min_p, usage, finish_reason. What it rejects is then left out,
            what it does not tell is 0 (usage) or guessed from the token count (finish_reason); about() says so.
        timeout_seconds: for one reply, whole.
        tries: of each request.
        backoff_seconds: before the second try; doubles from there, up to a minute.
        say, check: called from another thread: with a line for the user; and before each further try, to raise
            TeacherError if there is no point in one.

    Raises:
        TeacherError: an argument cannot be right.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrency: int = 32,
        allow: Sequence[str] = (),
        timeout_seconds: float = 600.0,
        tries: int = 10,
        backoff_seconds: float = 1.0,
        say: Callable[[str], None] = print,
        check: Callable[[], None] = lambda: None,
    ):
        if unknown := sorted(set(allow) - set(ALLOWABLE)):
            raise TeacherError(f"allow: {', '.join(unknown)} cannot be allowed, only {', '.join(ALLOWABLE)}")
        self._model, self._key_name, self._allow, self._say = model, api_key_env, sorted(set(allow)), say
        key = _key(api_key_env)
        manners = Manners(timeout_seconds, tries, backoff_seconds)
        urls = [url] if isinstance(url, str) else url
        self._servers = [ChatServer(each, key, manners, say, check) for each in urls]
        self._slots = asyncio.Semaphore(concurrency)
        # In a thread of its own: a Ctrl-C falls into whoever waits for answers, and not into the midst of a loop.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._tried: set[str] = set()  # what the probe has asked for
        self._left_out: set[str] = set()  # parameters that the server rejects, by leave of `allow`
        self._versions: dict[str, Any] | None = None

    def answer(self, requests: Sequence[Request], sampling: Sampling, max_new_tokens: int) -> list[Answer]:
        """One answer a request, in their order; the first call tries the server out.

        Raises:
            TeacherError: the server ignores what is relied on, rejects a request, or does not answer one after all
                tries; none of them counts as done.
        """
        return self._run(self._answer(requests, sampling, max_new_tokens)) if requests else []

    def about(self) -> dict[str, Any]:
        """What decides the answers, as far as a client can know; the chat template is the server's own."""
        return {"engine": "endpoint", "model": self._model, "allow": self._allow, "template": None}

    def versions(self) -> dict[str, Any]:
        """What the server says it is, and on which day (UTC) it said so; None or nothing where it does not tell."""
        if self._versions is None:
            self._versions = self._run(self._asked_versions())
        fingerprints = sorted(set().union(*(server.fingerprints for server in self._servers)))
        return {**self._versions, "system_fingerprints": fingerprints}

    def close(self) -> None:
        """Give up what is under way and close the connections; a second time does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._disconnected())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _disconnected(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for server in self._servers:
            await server.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._loop.is_closed():
            work.close()
            raise TeacherError("this teacher is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # of what nobody waits for any more

    async def _asked_versions(self) -> dict[str, Any]:
        server = self._servers[0]
        return {
            "engine": "endpoint",
            "version": await server.version(),
            "models": [model for model in await server.models() if model.get("id") == self._model],
            "asked": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }

    async def _answer(self, requests: Sequence[Request], sampling: Sampling, max_new_tokens: int) -> list[Answer]:
        await self._probe(sampling)
        parameters = self._parameters(sampling, max_new_tokens)
        bodies = [{"messages": request.messages, **parameters, "seed": request.seed} for request in requests]
        needs = {"usage", "finish_reason"} - set(self._allow)
        tasks = [
            asyncio.ensure_future(self._ask(self._servers[place % len(self._servers)], body, needs))
            for place, body in enumerate(bodies)
        ]
        try:
            replies = await asyncio.gather(*tasks)
        except Rejected as rejected:
            raise await self._refusal(rejected) from None
        except Unanswered as last:
            done = sum(task.done() and not task.cancelled() and task.exception() is None for task in tasks)
            raise TeacherError(
                f"{len(tasks) - done:,} of {len(tasks):,} requests are not answered: one failed each time it was "
                f"tried, the last time by {last}"
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [_answer(reply, max_new_tokens) for reply in replies]

    async def _ask(self, server: ChatServer, body: dict[str, Any], needs: set[str] = frozenset()) -> Reply:
        body = {name: value for name, value in body.items() if name not in self._left_out}
        async with self._slots:
            return await server.chat({"model": self._model, **body}, needs)

    def _parameters(self, sampling: Sampling, max_new_tokens: int) -> dict[str, Any]:
        """All of a request but its messages and seed."""
        extensions = {
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": None if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
        }
        return {
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "max_tokens": max_new_tokens,
            **{name: value for name, value in extensions.items() if value is not None},
        }

    async def _probe(self, sampling: Sampling) -> None:
        """Try out what `sampling` relies on and was not tried yet.

        Raises:
            TeacherError: a server does not do what is not allowed to be missing; all of it is named.
        """
        needs = _needs(sampling) - self._tried
        if not needs:
            return
        refused: list[str] = []
        for server in self._servers:
            for word, fault in (await self._faults_of(server, needs)).items():
                if word not in self._allow:
                    refused.append(f"{word}: {fault.told}")
                    continue
                self._say(f"{server.url}: {word}, which is allowed: {fault.told}")
                if fault.rejected:
                    self._left_out.add(word)
        if refused:
            words = ", ".join(dict.fromkeys(line.partition(":")[0] for line in refused))
            raise TeacherError(f"the server cannot be used for {self._model}: {'; '.join(dict.fromkeys(refused))}. Use "
                               f"another server, or write `allow: [{words}]` to go without")  # fmt: skip
        self._tried |= needs

    async def _faults_of(self, server: ChatServer, needs: set[str]) -> dict[str, Any]:
        try:
            return await faults(lambda body: self._ask(server, body), needs)
        except Rejected as rejected:
            raise await self._refusal(rejected) from None
        except Unanswered as last:
            raise TeacherError(f"{server.url} does not answer: {last}") from None

    async def _refusal(self, rejected: Rejected) -> TeacherError:
        """The one line for a status that no further try would change."""
        if rejected.status in (401, 403):
            return TeacherError(f"the server refuses the key ({rejected}): {self._key_advice()}")
        if rejected.status == 404:
            names = [str(model.get("id")) for server in self._servers[:1] for model in await server.models()]
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            listed = ", ".join(names[:_LISTED]) + more if names else "nothing: is the url right?"
            return TeacherError(f"model: {self._model!r} is not there ({rejected}); the server lists {listed}")
        if 300 <= rejected.status < 400:
            return TeacherError(f"url: the server points elsewhere ({rejected}): write the address where it is")
        return TeacherError(f"the server does not take a request ({rejected})")

    def _key_advice(self) -> str:
        if self._key_name is None:
            return "set api_key_env to the name of the environment variable that holds one"
        if _key(self._key_name) is None:
            return f"the environment variable {self._key_name} is not set"
        return f"check what the environment variable {self._key_name} holds"


def _key(name: str | None) -> str | None:
    key = os.environ.get(name, "").strip() if name else ""
    if not all("!" <= character <= "~" for character in key):
        raise TeacherError(f"the environment variable {name} holds characters that are in no key: copy it again")
    return key or None


def _needs(sampling: Sampling) -> set[str]:
    """What the answers depend on; a greedy answer draws nothing."""
    draws = sampling.temperature > 0
    relied = {"seed": draws, "top_k": draws and sampling.top_k is not None, "min_p": draws and bool(sampling.min_p)}
    return {"usage", "finish_reason"} | {word for word, is_relied in relied.items() if is_relied}


def _answer(reply: Reply, max_new_tokens: int) -> Answer:
    tokens = reply.tokens or 0
    guessed = "length" if tokens >= max_new_tokens else "stop"  # without usage a cut cannot be told
    return Answer(reply.text, reply.finish or guessed, reply.prompt_tokens or 0, tokens)
