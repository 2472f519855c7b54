"""What a server that speaks OpenAI's chat API makes of the parameters that a job relies on.

Many take a parameter and ignore it, without a word: then all samples of a problem are one, or no two runs are alike.
So before the first answer counts, the server is asked a few words at a temperature at which no two draws agree by
chance. Seeds are asked all at once, because there are servers that keep them apart only one request at a time; and a
half of what should agree is enough, because a batch's shape moves a GPU's logits a little, and now and then a draw.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

from distill.teachers.chat_api import Rejected, Reply

SEEDS = (11, 222, 3333, 44444)
MAX_TOKENS = 12  # few, so that a draw that falls otherwise seldom lies among them
_HOT = {"temperature": 1.5, "top_p": 1.0, "max_tokens": MAX_TOKENS}
_MESSAGES = [{"role": "user", "content": "Write a long list of random words, in no order, without any introduction."}]
_NARROWEST = {"top_k": 1, "min_p": 1.0}  # each leaves one token to draw, whatever the seed
Ask = Callable[[dict[str, Any]], Awaitable[Reply]]


@dataclass(frozen=True)
class Fault:
    """Something a server does not do: what it does instead, and whether the parameter must be left out."""

    told: str
    rejected: bool = False


async def faults(ask: Ask, needs: Collection[str]) -> dict[str, Fault]:
    """What is wrong, by the name of what is needed: seed, top_k, min_p, usage, finish_reason.

    Args:
        ask: sends a request's body, without the model's name.
        needs: which of them the job relies on; the others are not asked for.

    Raises:
        Rejected: the server does not take even the plain request.
    """
    plain = await asyncio.gather(*(ask({"messages": _MESSAGES, **_HOT}) for _ in SEEDS))
    found = {word: Fault(f"its replies have no {word}") for reply in plain for word in reply.missing()}
    cut = [reply.finish for reply in plain if (reply.tokens or 0) >= MAX_TOKENS]
    if len(cut) > 1 and set(cut) == {"stop"}:  # one may have ended by itself, just there
        found["finish_reason"] = Fault(f"it says \"stop\" of answers that were cut at {MAX_TOKENS} tokens")
    if "seed" in needs:
        _add(found, "seed", await _tried(_seed_fault, ask))
    seeded = not found.get("seed", Fault("")).rejected
    for word in [word for word in _NARROWEST if word in needs]:
        _add(found, word, await _tried(_filter_fault, ask, word, seeded))
    return {word: fault for word, fault in found.items() if word in needs}


def _add(found: dict[str, Fault], word: str, fault: Fault | None) -> None:
    if fault is not None:
        found[word] = fault


async def _tried(check: Callable[..., Awaitable[str | None]], *arguments: Any) -> Fault | None:
    try:
        told = await check(*arguments)
    except Rejected as rejected:
        if rejected.status not in (400, 422):
            raise
        return Fault(f"it rejects it ({rejected})", rejected=True)
    return Fault(told) if told else None


async def _seed_fault(ask: Ask) -> str | None:
    bodies = [{"messages": _MESSAGES, **_HOT, "seed": seed} for seed in SEEDS]
    replies = await asyncio.gather(*map(ask, bodies + bodies))
    first, again = ([reply.text for reply in half] for half in (replies[: len(SEEDS)], replies[len(SEEDS) :]))
    equal = sum(one == other for one, other in zip(first, again, strict=True))
    if equal < len(SEEDS) / 2:
        return f"equal seeds gave different texts ({len(SEEDS) - equal} of {len(SEEDS)} times, asked at once)"
    if len(set(first)) < len(SEEDS) - 1:
        return f"{len(SEEDS)} different seeds gave only {len(set(first))} different texts"
    return None


async def _filter_fault(ask: Ask, word: str, seeded: bool) -> str | None:
    bodies = [{"messages": _MESSAGES, **_HOT, word: _NARROWEST[word]} | ({"seed": seed} if seeded else {})
              for seed in SEEDS]  # fmt: skip
    texts = [reply.text for reply in await asyncio.gather(*map(ask, bodies))]
    ((_, most),) = Counter(texts).most_common(1)
    return None if most >= len(SEEDS) / 2 else f"with {word} {_NARROWEST[word]} it still draws other words"
