"""What a teacher is: something that answers requests. One file an engine.

    local      our own batched decoder on a Hugging Face folder or a run
    endpoint   any server that speaks OpenAI's chat API
    vllm       the same client, on a server that is started for it
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from models.inference.sampling import Sampling
from tokenizer.conversations import Message

Finish = Literal["stop", "length", "refused"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer that is wanted: the conversation so far, and the seed of its draws."""

    messages: list[Message]
    seed: int  # 0 to 2^63 - 1; the sampling's own seed does not count


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a teacher said: `stop`, it ended by itself; `length`, it was cut; `refused`, the server would not."""

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int  # of the answer, the end of turn counted


class TeacherError(RuntimeError):
    """The teacher cannot be used: the message says why, and what would be right."""


class Teacher(Protocol):
    """An engine that answers."""

    def answer(self, requests: Sequence[Request], sampling: Sampling, max_new_tokens: int) -> list[Answer]:
        """One answer a request, in their order.

        Raises:
            TeacherError: they cannot be answered now, none of them counts as done.
        """

    def about(self) -> dict[str, Any]:
        """All that decides what it answers, the same on every machine: model, revision or digest, template."""

    def versions(self) -> dict[str, Any]:
        """What it runs on: engine, version, device, dtype; recorded, and no part of the job's identity."""

    def close(self) -> None:
        """Let go of the device, or of the server that was started."""
