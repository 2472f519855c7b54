"""What is in a folder of shards, as text: `python -m data.inspect shards/NAME-FINGERPRINT [--documents 3]`.

Prints where it comes from, how much there is, what was dropped and the first malformed rows, then some documents as the
model reads them. Needs the tokenizer that the shards were made with: found beside them, or named with --tokenizer.
Exit codes: 0 shown, 1 the folder cannot be read or has changed since it was written, 2 wrong arguments.
"""

import argparse
import itertools
import json
import signal
import sys
from pathlib import Path

from data import shards
from storage import folder
from tokenizer import Tokenizer, TokenizerError


def main(arguments: list[str] | None = None) -> int:
    """Verify, describe, show."""
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=shards.SPLITS, default="train", help="side of the documents (train)")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many to show (3)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first one, from 0")
    parser.add_argument("--characters", type=int, default=1000, help="of each, at most (1000)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json, a folder with one, or hub:OWNER/NAME")
    args = parser.parse_args(arguments)
    if min(args.documents, args.first, args.characters) < 0:
        parser.error("--documents, --first and --characters count from 0")
    if (args.folder / "tokenizer.json").exists():
        parser.error(f"{args.folder} is a tokenizer: name a folder of shards, beside it")
    if problems := folder.verify(args.folder):
        print("\n".join(problems), file=sys.stderr)
        return 1
    try:
        about = shards.describe(args.folder)
        print(describe(args.folder, about))
        tokenizer = _tokenizer(args.folder, about, args.tokenizer)
        for number, text in shown(args.folder, about, tokenizer, args.split, args.first, args.documents):
            cut = f"... ({len(text):,} characters)" if len(text) > args.characters else ""
            print(f"\n--- {args.split} document {number}\n{text[: args.characters]}{cut}")
    except (OSError, ValueError, KeyError, TokenizerError) as error:
        print(f"{args.folder} cannot be shown: {error}", file=sys.stderr)
        return 1
    return 0


def describe(path: Path, about: dict) -> str:
    """The folder's description as lines for people."""
    lines = [f"{about['name']}: {about['source']}", f"vocabulary {about['vocab_size']:,}, stored as {about['dtype']}"]
    for split, counts in about["splits"].items():
        lines.append(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
                     f"{counts['bytes']:,} bytes of text in {len(counts['shards'])} shards")  # fmt: skip
        if "trained_tokens" in counts:
            lines.append(f"{split}: {counts['trained_tokens']:,} of these tokens are trained: what assistants say")
    lines += [told] if (told := shards.end_held_out(about)) else []
    lines += [f"dropped: {count:,} {reason}" for reason, count in about["dropped"].items()]
    quarantine = path / shards.QUARANTINE
    if quarantine.exists():
        with open(quarantine, encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, 3)]
        lines += [f"malformed: {row['place']}: {row['detail']}" for row in rows]
        lines.append(f"all malformed rows: {quarantine}")
    return "\n".join(lines)


def shown(path: Path, about: dict, tokenizer: Tokenizer, split: str, first: int, count: int):
    """(number, text) of some documents of one side."""
    number = 0
    for lengths, tokens, _ in shards.stored(path, about, split):
        starts = lengths.cumsum() - lengths
        for place in range(max(0, first - number), min(len(lengths), first + count - number)):
            ids = tokens[int(starts[place]) : int(starts[place] + lengths[place]) - 1]  # without its end of text
            yield number + place, tokenizer.decode(ids.tolist())
        number += len(lengths)


def _tokenizer(path: Path, about: dict, named: str | None) -> Tokenizer:
    candidates = [named] if named else shards.tokenizers_beside(path)
    for candidate in candidates:
        tokenizer = Tokenizer.load(candidate)
        if tokenizer.fingerprint == about["tokenizer_fingerprint"]:
            return tokenizer
    what = "that one is another" if named else "none beside them is"
    raise ValueError(f"these shards need the tokenizer they were made with, and {what}: name it with --tokenizer")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever closes the pipe has seen enough
    sys.exit(main())
