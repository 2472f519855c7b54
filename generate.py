"""Let a trained model write: python generate.py --checkpoint runs/x "Once upon a time"

Several prompts are continued together, as one batch; a single one streams to the terminal as it is written. With --chat
it is a conversation instead, a line a message, also from a pipe: an empty line or Ctrl-D ends it, Ctrl-C ends an
answer, and where there is none to end, the conversation. Exit codes: 0 done, 1 the checkpoint cannot be used, 2 wrong
arguments, 75 a conversation that Ctrl-C ended.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from machine import process

if TYPE_CHECKING:
    from torch import nn

    from tokenizer import Tokenizer
    from tokenizer.conversations import ChatFormat, Message

INTERRUPTED = 75  # exit code


def main() -> int:
    """Load the checkpoint, continue the prompts, print them; or hold a conversation."""
    arguments = _parse()
    for number in (signal.SIGPIPE, signal.SIGINT):  # whoever closes the pipe, or presses Ctrl-C, has seen enough
        signal.signal(number, signal.SIG_DFL)
    for output in (sys.stdout, sys.stderr):  # a terminal that knows fewer characters than the model
        output.reconfigure(errors="replace")
    process.prepare()
    import torch

    from checkpoints import CheckpointError, load_model, locate, never_drawn, stop_ids
    from models.compilation import compile_steps
    from models.inference.decoding import generate
    from models.inference.ready import for_decoding

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on what is not there
        print(f"--device {device} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    dtype = torch.bfloat16 if arguments.weights == "bf16" else None
    try:
        path = locate(arguments.checkpoint)
        model, tokenizer, config = load_model(path, device, context=arguments.context, dtype=dtype, located=True)
        ends, never = stop_ids(path, tokenizer), never_drawn(path, tokenizer)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    model = for_decoding(model, arguments.weights)
    if arguments.compile:
        compile_steps(model)
    further, unknown = _stop_ids(tokenizer, arguments.stop)
    if unknown:
        print(f"--stop: {', '.join(map(repr, unknown))} is not one token of this tokenizer", file=sys.stderr)
        return 2
    ends += further
    never = [token for token in never if token not in further]  # whoever names a stop wants it
    if arguments.chat:
        return _chat(arguments, path, model, tokenizer, ends, never)
    prompts = [[tokenizer.begin_of_text, *tokenizer.encode(prompt)] for prompt in arguments.prompts]
    if max(len(prompt) for prompt in prompts) >= config.context:
        longest = max(len(prompt) for prompt in prompts)
        print(f"a prompt has {longest} tokens: use fewer than the model's context of {config.context}", file=sys.stderr)
        return 2
    single = len(prompts) == 1
    stream = _Stream(lambda ids: tokenizer.continuation(prompts[0], ids)) if single else None
    if single:
        print(arguments.prompts[0], end="", flush=True)
    outputs = generate(
        model, prompts, arguments.max_new_tokens, ends, arguments.sampling, stream and stream.token,
        tokenizer.vocab_size, never=never,
    )  # fmt: skip
    if single:
        stream.finish()
    else:
        for text, prompt, new in zip(arguments.prompts, prompts, outputs, strict=True):
            print(f"{text}{tokenizer.continuation(prompt, new)}\n")
    return 0


def _chat(
    arguments: argparse.Namespace, path: Path, model: "nn.Module", tokenizer: "Tokenizer", ends: list[int],
    never: list[int],
) -> int:  # fmt: skip
    """Read messages and answer them until there are no more; returns the exit code."""
    from checkpoints import text_start
    from models.inference.decoding import generate
    from tokenizer import TokenizerError
    from tokenizer.conversations import ChatFormat

    try:
        format = ChatFormat(tokenizer)
    except TokenizerError as error:
        print(f"{arguments.checkpoint} cannot chat: {error}", file=sys.stderr)
        return 1
    conversation = _Conversation(
        format, text_start(path, tokenizer), model.config.context, arguments.max_new_tokens,
        arguments.system,
    )  # fmt: skip
    if refusal := conversation.refusal():
        print(f"{arguments.checkpoint} cannot chat so: its chat template refuses it: {refusal}", file=sys.stderr)
        return 2 if arguments.system is not None else 1
    ends = sorted({*ends, *format.stop_ids})
    sys.stdin.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while message := _next_message():
            prompt = conversation.ask(message)
            if prompt is None:
                continue
            stream = _Stream(tokenizer.decode)
            try:
                generate(model, [prompt], arguments.max_new_tokens, ends, arguments.sampling, stream.token,
                         tokenizer.vocab_size, seeds=[arguments.sampling.seed + conversation.turns],
                         never=never)  # fmt: skip
            except KeyboardInterrupt:
                print(" [ended]", end="", file=sys.stderr, flush=True)
            stream.finish()
            conversation.answered(tokenizer.decode(stream.ids))
    except KeyboardInterrupt:
        print(flush=True)
        return INTERRUPTED
    return 0


def _next_message() -> str | None:
    """The next line of whoever talks to the model; None, or empty, if there is no more."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


class _Conversation:
    """What was said, as much of it as fits the model's context beside an answer: the oldest exchanges go first, the
    system's turn stays."""

    def __init__(self, format: "ChatFormat", start: list[int], context: int, room: int, system: str | None):
        self.format, self.start, self.context, self.room = format, start, context, room
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []  # after it: a user's and an assistant's by turns
        self.turns = 0  # answered
        self._forgets = False

    def refusal(self) -> str | None:
        """Why the template has no form for such conversations; None if it has one."""
        roles = [message["role"] for message in self.system] + ["user", "assistant"] * 2
        return self.format.accepts(roles[:-2]) or self.format.accepts(roles)

    def ask(self, text: str) -> list[int] | None:
        """The ids after which the answer to `text` begins; None, and `text` is not asked, if it is too long by
        itself."""
        self.messages.append({"role": "user", "content": text})
        while len(ids := self._prompt()) > self.context - self.room and len(self.messages) > 1:
            del self.messages[:2]
            if not self._forgets:
                self._forgets = True
                print(f"the conversation no longer fits the context of {self.context} tokens: what is oldest is left "
                      "out from now on", file=sys.stderr, flush=True)  # fmt: skip
        if len(ids) < self.context:
            return ids
        self.messages.pop()
        print(f"that is {len(ids)} tokens: write less than the model's context of {self.context}", file=sys.stderr,
              flush=True)  # fmt: skip
        return None

    def answered(self, text: str) -> None:
        """Take up what the assistant said."""
        self.messages.append({"role": "assistant", "content": text})
        self.turns += 1

    def _prompt(self) -> list[int]:
        from tokenizer.conversations import begun

        return begun(self.start, self.format.prompt(self.system + self.messages))


class _Stream:
    """Prints text as its tokens come, holding back bytes that are not yet a whole character."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.ids: list[int] = []
        self.printed = ""

    def token(self, _row: int, token: int) -> None:
        """Take in one more token."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):  # an unfinished character decodes to the replacement mark
            self._print(text)

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        self._print(self.decode(self.ids))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text


def _stop_ids(tokenizer: "Tokenizer", stops: list[str]) -> tuple[list[int], list[str]]:
    """Ids of `stops`, each one token; and the stops that are not."""
    encoded = {stop: tokenizer.encode(stop, allow_special=True) for stop in stops}
    unknown = [stop for stop, ids in encoded.items() if len(ids) != 1]
    return [ids[0] for ids in encoded.values() if len(ids) == 1], unknown


def _parse() -> argparse.Namespace:
    from models.inference.sampling import Sampling

    defaults = Sampling()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True,
                        help="a run's folder, a checkpoint, a Hugging Face folder, or hub:OWNER/NAME")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="a conversation, by the tokenizer's chat template")
    parser.add_argument("--system", metavar="TEXT", help="what the conversation's system turn says (none)")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="at most (default: the model's own)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=defaults.temperature,
                        help="0: always the likeliest token (default: %(default)s)")  # fmt: skip
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that together have this probability")
    parser.add_argument("--min-p", type=float, help="draw from those at least this share as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, help="1: none")
    parser.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="also end before this token")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the draws (default: %(default)s)")
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), default="fp32", help="smaller reads faster")
    parser.add_argument("--compile", action="store_true", help="torch.compile: slow to begin, then faster on a GPU")
    parser.add_argument("--device", help="default: cuda when there is one, else cpu")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    arguments = parser.parse_args()
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    arguments.sampling = Sampling(**{name: getattr(arguments, name) for name in fields})
    found = arguments.sampling.problems()
    problems = [f"--{name.replace('_', '-')} {value}: {remedy}" for name, value, remedy in found]
    if arguments.max_new_tokens < 1:
        problems.append(f"--max-new-tokens {arguments.max_new_tokens}: use 1 or more")
    if arguments.context is not None and arguments.context < 2:
        problems.append(f"--context {arguments.context}: use 2 or more")
    if arguments.chat and arguments.prompts:
        problems.append("--chat takes its messages from the terminal or a pipe: leave the prompts out")
    if not arguments.chat and not arguments.prompts:
        problems.append("name a prompt, or --chat")
    if not arguments.chat and arguments.system is not None:
        problems.append("--system is for conversations: add --chat")
    for prompt in [*arguments.prompts, arguments.system or ""]:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on other bytes
            problems.append(f"the prompt {prompt!r} is not UTF-8: write it in UTF-8")
    if problems:
        parser.error("; ".join(problems))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
