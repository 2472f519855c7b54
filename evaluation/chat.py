"""How a checkpoint converses: `python -m evaluation.chat --checkpoint runs/x --data jsonl:chat.jsonl [--json FILE]`.

Of conversations that the run held out, by the same hash of the first user's turn (--all takes all of them):
  - the loss on what the assistant says and ends its turn with, in nats a trained token, and its perplexity;
  - of answers that the model gives to the first turns, greedily, the share that end by the end of the turn, and the
    share that leak a role: a mark of the template, spelled out or as a token, or a line that begins "User:".

Several processes share the work: `accelerate launch -m evaluation.chat ...`. Exit codes: 0 done, 1 the checkpoint or
the data cannot be used, 2 wrong arguments, 75 interrupted.
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption
    from machine import process

    interruption.end_at_once("interrupted: nothing was written; the same command begins again")
    process.prepare()

import argparse
import collections
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import conversations, sources
from data.preparation import clean, interruption
from evaluation import command, record
from evaluation.asking import (
    ALONE,
    Log,
    Processes,
    Progress,
    Reply,
    ask,
    batches,
    device_of,
)
from evaluation.intervals import wilson
from evaluation.problems import valid_fraction_of
from machine import process

if TYPE_CHECKING:
    from torch import nn

    from tokenizer import Tokenizer
    from tokenizer.conversations import ChatFormat, Message

ROWS_AT_ONCE = 8  # conversations in one forward pass
_ROLE_LINE = re.compile(r"^[ \t]*(?:User|Assistant|Human):", re.MULTILINE)


@dataclass(frozen=True)
class Conversation:
    """One held-out conversation: its text, and with what its model reads it."""

    text: str  # as data.conversations makes it of a row
    ids: list[int]  # what begins every text first
    mask: list[int]  # 1 where the assistant speaks

    def first_turns(self) -> list["Message"]:
        """All that comes before the first answer."""
        messages = conversations.messages_of(self.text)
        return messages[: next(place for place, message in enumerate(messages) if message["role"] == "assistant")]


def held_out(texts: Sequence[str], valid_fraction: float) -> list[str]:
    """The conversations whose first question training never saw."""
    return [text for text in texts if clean.split_of(conversations.question_of(text), valid_fraction) == "valid"]


def encoded(
    texts: Sequence[str], chat: "ChatFormat", start: list[int], context: int
) -> tuple[list[Conversation], dict[str, int]]:
    """The conversations as the model reads them, and how many are left out, by reason: the template has no form for
    their roles, or they are longer than the context."""
    from tokenizer.conversations import begun

    left_out: collections.Counter[str] = collections.Counter()
    found = []
    for text in texts:
        messages = conversations.messages_of(text)
        if chat.accepts([message["role"] for message in messages]) is not None:
            left_out["no_form_in_template"] += 1
            continue
        ids, mask = chat.encode(messages)
        whole = begun(start, ids)
        if len(whole) - 1 > context:  # the last token is not fed
            left_out["longer_than_context"] += 1
            continue
        found.append(Conversation(text, whole, [0] * (len(whole) - len(ids)) + mask))
    return found, dict(left_out)


def losses(
    model: "nn.Module", asked: Sequence[Conversation], group: Processes = ALONE
) -> list[tuple[float, int]]:
    """(loss sum in nats, trained tokens) of each conversation: of every token in its mask, given all before it."""
    import torch

    from models.inference.decoding import evaluating
    from models.kernels.losses import linear_cross_entropy

    device = next(model.parameters()).device
    found: dict[int, tuple[float, int]] = {}
    with evaluating(model), torch.inference_mode():
        for rows in batches([each.ids for each in asked], ROWS_AT_ONCE)[group.rank :: group.world]:
            longest = max(len(asked[row].ids) for row in rows)
            padded = [asked[row].ids + [0] * (longest - len(asked[row].ids)) for row in rows]  # behind, so never seen
            hidden = model.hidden_states(torch.tensor(padded, device=device)[:, :-1])
            for row, states in zip(rows, hidden, strict=True):
                trained = [place for place in range(1, len(asked[row].ids)) if asked[row].mask[place]]
                labels = torch.tensor([asked[row].ids[place] for place in trained], device=device)
                before = torch.tensor(trained, device=device) - 1
                total = linear_cross_entropy(states[before], model.head_weight, labels)
                found[row] = float(total), len(trained)
    everything = group.gather(found)
    return [everything[row] for row in range(len(asked))]


def leaks_role(text: str, tokenizer: "Tokenizer", chat: "ChatFormat") -> bool:
    """Whether an answer holds a mark of the template, or the beginning of somebody's turn in plain text."""
    marks = (name for name, token in tokenizer.special_tokens.items() if token not in chat.stop_ids)
    return any(mark in text for mark in marks) or _ROLE_LINE.search(text) is not None


def answers(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    chat: "ChatFormat",
    prompts: Sequence[Sequence[int]],
    **asking: Any,
) -> list[tuple[Reply, bool]]:
    """(reply, whether it ended by the end of the turn) to each prompt; `asking` goes to `ask`.

    The end of text does not end a turn: where it is another token, what was said ends there, and not rightly.
    """
    replies = ask(model, tokenizer, prompts, stop_ids=[chat.end_of_turn], **asking)
    found = []
    for reply in replies:
        text, ended, _ = reply.text.partition(tokenizer.end_of_text_token)
        finish = "stop" if ended else reply.finish
        found.append((Reply(text, finish, reply.tokens), reply.finish == "stop" and not ended))
    return found


def evaluate(arguments: argparse.Namespace, group: Processes, log: Log) -> dict[str, Any]:
    """The whole result, as --json writes it; the same on every process."""
    from checkpoints import load_model, locate, never_drawn, text_start
    from models.inference.ready import for_decoding
    from tokenizer.conversations import ChatFormat, begun

    device = device_of(arguments.device, group)
    path = locate(arguments.checkpoint)
    fraction = valid_fraction_of(path) if arguments.valid_fraction is None else arguments.valid_fraction
    texts, bad = _read(arguments, fraction)
    model, tokenizer, config = load_model(path, device, located=True)
    chat, start = ChatFormat(tokenizer), text_start(path, tokenizer)
    asked, left_out = encoded(texts, chat, start, config.context)
    if not asked:
        raise sources.SourceError(f"{arguments.data}: none of its {len(texts)} conversations can be asked ({left_out})")
    found = losses(model, asked, group)
    model = for_decoding(model, arguments.weights)
    some = asked[: arguments.answers]
    prompts = [begun(start, chat.prompt(each.first_turns())) for each in some]
    never = never_drawn(path, tokenizer)
    said = answers(model, tokenizer, chat, prompts, max_new_tokens=arguments.max_new_tokens, batch=arguments.batch,
                   never=never, group=group, progress=Progress(path.name, group, log))  # fmt: skip
    leaks = [leaks_role(reply.text, tokenizer, chat) for reply, _ in said]
    nats, tokens = sum(loss for loss, _ in found), sum(count for _, count in found)
    return {
        "evaluation": "chat", "checkpoint": {"given": arguments.checkpoint, "name": path.name}, "data": arguments.data,
        "valid_fraction": None if arguments.all else fraction, "conversations": len(asked), "trained_tokens": tokens,
        "left_out": {**bad, **left_out}, "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens) if nats / tokens < 700 else math.inf,
        "answers": len(said), "max_new_tokens": arguments.max_new_tokens, "weights": arguments.weights,
        "stops": _share([stopped for _, stopped in said]), "role_leaks": _share(leaks),
        "items": [_item(number, pair, said, leaks) for number, pair in enumerate(found)],
    }  # fmt: skip


def _read(arguments: argparse.Namespace, fraction: float) -> tuple[list[str], dict[str, int]]:
    """The conversations that are asked, and how many rows are none, by reason."""
    bad: collections.Counter[str] = collections.Counter()
    texts = []
    for item in sources.documents(arguments.data, None, arguments.split):
        if isinstance(item, sources.BadRow):
            bad[item.reason] += item.count
        else:
            texts.append(item)
    chosen = texts if arguments.all else held_out(texts, fraction)
    if not chosen:
        told = ", ".join(f"{count} {reason}" for reason, count in bad.items()) or "no row is bad"
        raise sources.SourceError(
            f"{arguments.data} has {len(texts)} conversations ({told}), none of them held out at a valid fraction of "
            f"{fraction}: use --all or another --valid-fraction"
        )
    return chosen[: arguments.limit], dict(bad)


def _share(yes: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(yes), len(yes))
    return {"count": sum(yes), "share": sum(yes) / len(yes), "low": low, "high": high}


def _item(
    number: int, loss: tuple[float, int], said: Sequence[tuple[Reply, bool]], leaks: Sequence[bool]
) -> dict[str, Any]:
    item: dict[str, Any] = {"nats": loss[0], "trained_tokens": loss[1]}
    if number < len(said):
        reply, stopped = said[number]
        item |= {"stopped": stopped, "leaks": leaks[number], "tokens": reply.tokens, "text": reply.text}
    return item


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in result["left_out"].items()) or "nothing"
    asked = result["checkpoint"]
    lines = [
        f"{asked['given']} ({asked['name']}): {result['conversations']:,} conversations of {result['data']} (left out: "
        f"{left_out})",
        f"  loss {result['loss']:.4f} nats a trained token, perplexity {result['perplexity']:.2f} "
        f"({result['trained_tokens']:,} tokens)",
    ]
    for name, told in (("stops", "end by the end of the turn"), ("role_leaks", "leak a role")):
        share = result[name]
        lines.append(f"  {share['share']:.1%} of {result['answers']:,} answers of at most {result['max_new_tokens']} "
                     f"tokens {told} ({share['low']:.1%} to {share['high']:.1%})")  # fmt: skip
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a checkpoint, or a Hugging Face folder")
    parser.add_argument("--data", required=True, help="conversations: jsonl:, parquet: or hub:")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="train",
                        help="of a Hub data set (default: %(default)s)")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="also conversations that the run may have trained on")
    parser.add_argument("--valid-fraction", type=float, help="share held out (default: the run's, else 0.05)")
    parser.add_argument("--limit", type=int, help="only the first so many conversations")
    parser.add_argument("--answers", type=int, default=200, help="how many to answer (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="answers decoded together (default: %(default)s)")
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), default="fp32", help="to answer with")
    parser.add_argument("--device", help="default: a GPU for each process when there are, else cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parsed = parser.parse_args(arguments)
    found = []
    for name in ("limit", "answers", "max_new_tokens", "batch"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            found.append(f"--{name.replace('_', '-')} {value}: use 1 or more")
    if parsed.valid_fraction is not None and not 0 < parsed.valid_fraction <= 1:
        found.append(f"--valid-fraction {parsed.valid_fraction}: use a number above 0 and at most 1")
    if remedy := record.fault(parsed.json):
        found.append(f"--json {parsed.json}: {remedy}")
    remedy = sources.fault(parsed.data)
    if parsed.data.startswith(("embedded:", "text:")):
        remedy = "name jsonl:, parquet: or hub:, whose rows can be conversations"
    if remedy:
        found.append(f"--data {parsed.data}: {remedy}")
    if found:
        parser.error("; ".join(found))
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return command.run(_parse(arguments), evaluate, report)


if __name__ == "__main__":
    process.end_with_launcher()
    process.outlive_readers()
    interruption.interrupt_once()
    sys.exit(main())
