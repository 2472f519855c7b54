"""Train a byte-level BPE tokenizer on text or JSON-lines files and write it as a folder that `transformers` loads.

    python -m tokenizer.train --from jsonl:stories/*.jsonl --from text:book.txt --vocab-size 8192 --out tokenizers/mine

Every tenth document is held out, to report bytes per token on text that the tokenizer did not see. JSON-lines rows
give one document each; a text file is cut at line ends into pieces of at least 4,096 characters; either may be
compressed (storage/inputs.py). Exit codes: 0 when the folder is written, 2 for bad arguments or input, 75 interrupted.
"""

import argparse
import io
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from storage import inputs

if TYPE_CHECKING:
    from tokenizer import Tokenizer

PIECE = 4_096  # characters of a text file that make a document
BATCH = 512  # documents encoded at a time when measuring
HELD_OUT = 10  # one document in so many


class Corpus:
    """The documents of some files, in order; can be read again. `dropped` counts, by reason, what the last reading
    left out.

    Raises:
        ValueError: a source is not KIND:PATH_OR_GLOB, matches no file or one that is no corpus, or is a text file that
            is not UTF-8.
    """

    def __init__(self, sources: Sequence[str], field: str = "text", limit: int | None = None):
        self.field = field
        self.limit = limit
        self.dropped: Counter[str] = Counter()
        self.files = [(kind, path) for source in sources for kind, path in _expand(source)]

    def __iter__(self) -> Iterator[str]:
        self.dropped.clear()
        return itertools.islice(self._documents(), self.limit)

    def _documents(self) -> Iterator[str]:
        for kind, path in self.files:
            for text in self._rows(path) if kind == "jsonl" else _pieces(path):
                if text:
                    yield text
                else:
                    self.dropped["empty"] += 1

    def _rows(self, path: Path) -> Iterator[str]:
        with inputs.reading(path) as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.field]
                    text.encode()  # JSON can spell lone surrogates, which no UTF-8 text holds
                except UnicodeError:
                    self.dropped["not UTF-8"] += 1
                except (ValueError, RecursionError):
                    self.dropped["not JSON"] += 1
                except (KeyError, TypeError, AttributeError):
                    self.dropped[f"no text in field {self.field!r}"] += 1
                else:
                    yield text

    def training(self) -> Iterator[str]:
        return (text for number, text in enumerate(self) if (number + 1) % HELD_OUT)

    def held_out(self) -> Iterator[str]:
        return itertools.islice(self, HELD_OUT - 1, None, HELD_OUT)


def _expand(source: str) -> list[tuple[str, Path]]:
    kind, colon, pattern = source.partition(":")
    if kind not in ("jsonl", "text") or not colon or not pattern:
        raise ValueError(f"--from {source}: write jsonl:PATH_OR_GLOB or text:PATH_OR_GLOB")
    files = [(kind, path) for path in inputs.find(pattern)]
    if not files:
        raise ValueError(f"--from {source}: no such file")
    if remedy := next((remedy for _, path in files if (remedy := inputs.fault(path))), None):
        raise ValueError(f"--from {source}: {remedy}")
    return files


def _pieces(path: Path) -> Iterator[str]:
    piece, length = [], 0
    # newline="": line ends stay as they are
    with inputs.reading(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as lines:
        try:
            for line in lines:
                piece.append(line)
                length += len(line)
                if length >= PIECE:
                    yield "".join(piece)
                    piece, length = [], 0
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error})") from error
    if piece:
        yield "".join(piece)


def measure(tokenizer: "Tokenizer", texts: Iterable[str]) -> dict[str, int]:
    """Documents, UTF-8 bytes and tokens of `texts`."""
    totals = Counter(documents=0, bytes=0, tokens=0)
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH)):
        totals["documents"] += len(batch)
        totals["bytes"] += sum(len(text.encode()) for text in batch)
        totals["tokens"] += sum(map(len, tokenizer.encode_batch(batch)))
    return dict(totals)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="sources", action="append", required=True, metavar="KIND:PATH",
                        help="jsonl:PATH_OR_GLOB or text:PATH_OR_GLOB; may be given several times")  # fmt: skip
    parser.add_argument("--field", default="text", help="the field of JSON-lines rows that holds the text")
    parser.add_argument("--documents", type=int, help="read at most so many documents (default: all)")
    parser.add_argument("--vocab-size", type=int, default=4_096, help="1,024 to 50,257 entries (default: 4,096)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist yet")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"--out {args.out} exists already: name a new folder")
    if args.documents is not None and args.documents < 1:
        parser.error(f"--documents {args.documents}: give a positive number")
    try:
        corpus = Corpus(args.sources, args.field, args.documents)
        _train(corpus, args.vocab_size, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 75
    return 0


def _train(corpus: Corpus, vocab_size: int, out: Path) -> None:
    from storage import folder
    from tokenizer import Tokenizer

    started = time.monotonic()
    if next(iter(corpus), None) is None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items())
        raise ValueError(f"no documents in {len(corpus.files)} file(s)" + (f" (dropped: {reasons})" if reasons else ""))
    tokenizer = Tokenizer.train(corpus.training(), vocab_size)
    training, held_out = measure(tokenizer, corpus.training()), measure(tokenizer, corpus.held_out())
    lossless = tokenizer.is_lossless(corpus.held_out())
    with folder.write(out) as temporary:
        tokenizer.save(temporary)
    for reason, count in corpus.dropped.items():
        print(f"dropped      {count:,} rows: {reason}")
    print(f"entries      {tokenizer.vocab_size:,} of {vocab_size:,} asked for")
    print(f"training     {_describe(training)}")
    print(f"held out     {_describe(held_out)}" + ("" if lossless else "; some of it does NOT come back exactly"))
    print(f"fingerprint  {tokenizer.fingerprint}")
    print(f"written      {out} in {time.monotonic() - started:.1f} s")


def _describe(totals: dict[str, int]) -> str:
    if not totals["documents"]:
        return f"no documents (fewer than {HELD_OUT} in all)"
    rate = totals["bytes"] / totals["tokens"]
    return f"{rate:.3f} bytes per token ({totals['documents']:,} documents, {totals['bytes']:,} bytes)"


if __name__ == "__main__":
    sys.exit(main())
