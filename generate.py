"""Let a trained model write: python generate.py --checkpoint runs/x "Once upon a time"

Several prompts are continued together, as one batch; a single one streams to the terminal as it is written. Exit
codes: 0 done, 1 the checkpoint cannot be used, 2 wrong arguments.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from models import host

if TYPE_CHECKING:
    from tokenizer import Tokenizer


def main() -> int:
    """Load the checkpoint, continue the prompts, print them."""
    arguments = _parse()
    for number in (signal.SIGPIPE, signal.SIGINT):  # whoever closes the pipe, or presses Ctrl-C, has seen enough
        signal.signal(number, signal.SIG_DFL)
    for output in (sys.stdout, sys.stderr):  # a terminal that knows fewer characters than the model
        output.reconfigure(errors="replace")
    host.prepare()
    import torch

    from checkpoints import CheckpointError, load_model
    from models.compilation import compile_steps
    from models.decoding import generate
    from models.inference import for_decoding

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on what is not there
        print(f"--device {device} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    try:
        model, tokenizer, config = load_model(arguments.checkpoint, device)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    model = for_decoding(model, arguments.weights)
    if arguments.compile:
        compile_steps(model)
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in arguments.prompts]
    stop_ids, unknown = _stop_ids(tokenizer, arguments.stop)
    if unknown:
        print(f"--stop: {', '.join(map(repr, unknown))} is not one token of this tokenizer", file=sys.stderr)
        return 2
    if max(len(prompt) for prompt in prompts) >= config.context:
        longest = max(len(prompt) for prompt in prompts)
        print(f"a prompt has {longest} tokens: use fewer than the model's context of {config.context}", file=sys.stderr)
        return 2
    single = len(prompts) == 1
    stream = _Stream(tokenizer.decode) if single else None
    if single:
        print(arguments.prompts[0], end="", flush=True)
    outputs = generate(
        model, prompts, arguments.max_new_tokens, stop_ids, arguments.sampling, stream and stream.token,
        tokenizer.vocab_size,
    )  # fmt: skip
    if single:
        stream.finish()
    else:
        for prompt, new in zip(arguments.prompts, outputs, strict=True):
            print(f"{prompt}{tokenizer.decode(new)}\n")
    return 0


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
    """Ids of the end of text and of `stops`, each one token; and the stops that are not."""
    encoded = {stop: tokenizer.encode(stop, allow_special=True) for stop in stops}
    unknown = [stop for stop, ids in encoded.items() if len(ids) != 1]
    return [tokenizer.end_of_text, *(ids[0] for ids in encoded.values() if len(ids) == 1)], unknown


def _parse() -> argparse.Namespace:
    from models.sampling import Sampling

    defaults = Sampling()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a checkpoint, or a Hugging Face folder")
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
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    arguments = parser.parse_args()
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    arguments.sampling = Sampling(**{name: getattr(arguments, name) for name in fields})
    found = arguments.sampling.problems()
    problems = [f"--{name.replace('_', '-')} {value}: {remedy}" for name, value, remedy in found]
    if arguments.max_new_tokens < 1:
        problems.append(f"--max-new-tokens {arguments.max_new_tokens}: use 1 or more")
    for prompt in arguments.prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on other bytes
            problems.append(f"the prompt {prompt!r} is not UTF-8: write it in UTF-8")
    if problems:
        parser.error("; ".join(problems))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
