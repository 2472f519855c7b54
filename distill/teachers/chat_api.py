"""One server that speaks OpenAI's chat API: a request goes out as often as it takes, and its reply comes back.

What may pass is tried again, after a wait that doubles and is drawn at random from its upper half (so that requests
that failed together do not come back together): 408, 409, 425, 429, every 5xx, dropped connections, time-outs, and
replies that are not the JSON they should be. A Retry-After is honoured. Any other status is final.
"""

import asyncio
import contextlib
import datetime
import email.utils
import functools
import json
import random
import ssl
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import httpx

from distill.teachers import Finish, TeacherError

_MAY_PASS = {408, 409, 425, 429}  # and every 5xx
_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
_PATIENCE = 600.0  # seconds that a server may ask for
_SAID_EVERY = 60.0  # seconds between two lines about failed tries
_QUOTED = 300  # characters of a server's own words
_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "refused"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Rejected(Exception):
    """The server will not answer this request, now or later: `status`, and what it said."""

    def __init__(self, status: int, said: str):
        super().__init__(f"HTTP {status}: {said}" if said else f"HTTP {status}")
        self.status = status


class Unanswered(Exception):
    """Every try failed; the message is the last one's reason."""


class _Failed(Exception):
    """One try failed, the next may not; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """What a server answered; None where it does not tell."""

    text: str
    finish: Finish | None
    prompt_tokens: int | None
    tokens: int | None

    def missing(self) -> set[str]:
        """Which of `usage` and `finish_reason` it does not tell."""
        told = {"usage": self.tokens is not None, "finish_reason": self.finish is not None}
        return {word for word, there in told.items() if not there}


@dataclass(frozen=True)
class Manners:
    """How patient a client is: seconds for one reply, tries of one request, seconds before the second try."""

    timeout_seconds: float
    tries: int
    backoff_seconds: float


class ChatServer:
    """A server at `url`; to be used within one event loop.

    Args:
        url: http(s)://host[:port][/path]; without a path, /v1.
        key: what the server's owner gave, or None. It goes into the requests' header and nowhere else: no message
            holds it, not even one in which the server repeats it.
        check: called before each further try; raises if there is no point in one.

    Attributes:
        fingerprints: every `system_fingerprint` that came with a reply.

    Raises:
        TeacherError: the url is none, or holds a password.
    """

    def __init__(self, url: str, key: str | None, manners: Manners, say: Callable[[str], None],
                 check: Callable[[], None] = lambda: None):  # fmt: skip
        self.url = _base(url)
        self.fingerprints: set[str] = set()
        self._key, self._manners, self._say, self._check = key, manners, say, check
        self._draw = random.Random()  # of its own: nobody else's draws depend on how often a server fails
        self._said = -_SAID_EVERY
        local = httpx.URL(self.url).host in _LOOPBACK
        if key and not local and self.url.startswith("http:"):
            say(f"{self.url} is not encrypted: whoever is on the way there can read the key")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(manners.timeout_seconds, connect=min(30.0, manners.timeout_seconds), pool=None),
            limits=httpx.Limits(max_connections=None),  # whoever asks keeps to a bound
            verify=_tls(),
            trust_env=not local,  # a proxy cannot reach this machine's own servers
        )

    async def chat(self, body: dict[str, Any], needs: Collection[str] = ()) -> Reply:
        """The reply to one request; one that lacks any of `needs` (usage, finish_reason) counts as failed.

        Raises:
            Rejected: the server does not take it.
            Unanswered: every try failed.
        """

        def reply(said: Any) -> Reply:
            reply = _reply(said)
            if lacking := reply.missing() & set(needs):
                raise ValueError(f"no {' and no '.join(sorted(lacking))}")
            if isinstance(said.get("system_fingerprint"), str):
                self.fingerprints.add(said["system_fingerprint"])
            return reply

        for number in range(self._manners.tries):
            try:
                return await self._exchange("POST", f"{self.url}/chat/completions", reply, body)
            except _Failed as failed:
                failure = failed
            if number + 1 < self._manners.tries:
                await self._wait(number, failure)
        raise Unanswered(str(failure))

    async def _wait(self, number: int, failure: _Failed) -> None:
        """Sleep after try `number` (from 0) failed."""
        self._check()
        if failure.wait > _PATIENCE:
            raise Unanswered(f"{failure}; the server asks to come back in {failure.wait:,.0f} seconds")
        if time.monotonic() - self._said >= _SAID_EVERY:
            self._said = time.monotonic()
            self._say(f"{self.url}: {failure}; trying again")
        longest = min(_LONGEST_WAIT, self._manners.backoff_seconds * 2**number)
        await asyncio.sleep(failure.wait + longest * self._draw.uniform(0.5, 1.0))
        self._check()

    async def models(self) -> list[dict[str, Any]]:
        """What /models lists: id, and what else is public there; empty if the server does not tell."""

        def listed(said: Any) -> list[dict[str, Any]]:
            public = ("id", "owned_by", "max_model_len")  # `root` is a path on the server's machine
            return [{name: model[name] for name in public if name in model} for model in said["data"]]

        with contextlib.suppress(_Failed, Rejected):
            return await self._exchange("GET", f"{self.url}/models", listed)
        return []

    async def version(self) -> str | None:
        """vLLM's and SGLang's word for what they are, or the `Server` header; None if there is neither."""
        root = self.url.removesuffix("/v1")
        with contextlib.suppress(_Failed, Rejected):
            return await self._exchange("GET", f"{root}/version", lambda said: str(said["version"]))
        with contextlib.suppress(httpx.HTTPError):
            return (await self._client.get(f"{self.url}/models")).headers.get("server")
        return None

    async def close(self) -> None:
        await self._client.aclose()

    async def _exchange(self, method: str, url: str, read: Callable[[Any], Any], body: Any = None) -> Any:
        """One try: `read` of the JSON that came back.

        Raises:
            _Failed: another try may succeed.
            Rejected: it will not.
        """
        try:
            async with asyncio.timeout(self._manners.timeout_seconds):  # httpx's own starts anew with each byte
                response = await self._client.request(method, url, json=body)
        except TimeoutError:
            raise _Failed(f"no reply within {self._manners.timeout_seconds:g} seconds") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Failed(self._scrubbed(f"{type(error).__name__}: {error}".rstrip(": "))) from None
        if response.status_code != 200:
            self._raise(response)
        try:
            return read(json.loads(response.content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            told = _message_of(response) or f"{type(error).__name__}: {error}"
            raise _Failed(self._scrubbed(f"an unexpected reply: {told}")) from None

    def _raise(self, response: httpx.Response) -> None:
        status = response.status_code
        said = self._scrubbed(_message_of(response))
        if status in _MAY_PASS or status >= 500:
            raise _Failed(f"HTTP {status}" + (f": {said}" if said else ""), _retry_after(response))
        raise Rejected(status, said)

    def _scrubbed(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "[key]") if self._key else text)[:_QUOTED]


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # reads every certificate there is, a fifth of a second


def _base(url: str) -> str:
    """The address to which /chat/completions is added."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        raise TeacherError("url: not an address: write http://HOST:PORT/v1") from None
    if parts.userinfo or parts.query or parts.fragment:
        raise TeacherError("url: holds more than scheme, host and path: a key belongs into an environment variable, "
                           "and api_key_env names it")  # fmt: skip
    if parts.scheme not in ("http", "https") or not parts.host or "%" in parts.host:
        raise TeacherError(f"url: {url!r} is no web address: write http://HOST:PORT/v1")
    base = str(parts).rstrip("/").removesuffix("/chat/completions")
    return base if httpx.URL(base).path.strip("/") else f"{base}/v1"


def _reply(said: Any) -> Reply:
    """A reply's one choice; anything that no chat completion looks like raises."""
    (choice,) = said["choices"]
    message = choice["message"]
    content, finish = message.get("content"), choice.get("finish_reason")
    if not isinstance(content, str | None):
        raise TypeError("the content is no text")
    if not isinstance(finish, str | None) or (finish is not None and finish not in _FINISHES):
        raise ValueError(f"finish_reason {finish!r}")
    usage = said.get("usage") or {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if any(not isinstance(count, int) or count < 0 for count in counts):
        counts = [None, None]
    refused = finish is not None and bool(message.get("refusal"))
    return Reply(_whole(content or ""), "refused" if refused else finish and _FINISHES[finish], *counts)


def _whole(text: str) -> str:
    """The text without halves of characters, which JSON can hold and no file can."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _message_of(response: httpx.Response) -> str:
    """A server's own words for what is wrong, wherever it puts them; else the beginning of what it sent."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(response.content)
        if response.status_code == 200 and not (isinstance(said, dict) and said.get("error")):
            return ""
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
        return said if isinstance(said, str) else json.dumps(said)
    return "" if response.status_code == 200 else response.text


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 if it does not."""
    asked = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        seconds = float(asked)
        return max(0.0, seconds) if seconds == seconds else 0.0
    with contextlib.suppress(ValueError, TypeError):
        until = email.utils.parsedate_to_datetime(asked)
        return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
    return 0.0
