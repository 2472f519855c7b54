"""Documents -> verified token shards: `python -m data.prepare --config config.yaml [section.key=value ...]`.

Every source is read and filtered, freed of duplicates and split into training and validation, tokenised (in the stages
of data/preparation/) and written to `shards/NAME-FINGERPRINT/` (format: data/shards.py). The fingerprint covers all
that decides the content: the files' content, the options, the code's version and the tokenizer. What is there already
and verifies is left alone, so a second run does nothing, and runs with equal sources share their shards. Interrupted at
any instant, the same command goes on where it was. Rows that are no documents stand in the folder's quarantine.jsonl.
Only the `data` and `tokenizer` sections of the config are looked at. Exit codes: 0 prepared, 1 a source cannot be read
or written, 2 the config is wrong, 75 interrupted (asked a second time, it ends at once with 128 + the signal's number).
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption

    interruption.end_at_once()

import argparse
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import heapq
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

import settings
from data import conversations, embedded, shards, sources
from data.preparation import clean, interruption, write_tokens
from data.preparation.documents import Documents, valid_count
from data.preparation.workers import Workers
from data.settings import DataSection, EvaluationSet
from machine import process
from storage import folder
from tokenizer import Tokenizer, TokenizerError
from tokenizer.conversations import ChatFormat
from tokenizer.settings import TokenizerSection

CODE_VERSION = 5  # raise it whenever the same documents would give other shards, or another tokenizer
SHARD_TOKENS = 100_000_000
SAMPLE_BYTES = 30_000_000  # of text that a tokenizer is trained on, spread evenly over the sources
PROGRESS_SECONDS = 30
REFUSED = "refused_by_chat_template"

Log = Callable[[str], object]


class Config(settings.Section):
    """The part of a run's config that preparation reads."""

    data: DataSection
    tokenizer: TokenizerSection = TokenizerSection()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The tokenizer of a run and the verified shard folder of each of its sources."""

    tokenizer: Tokenizer
    sources: dict[str, Path]

    def describe(self, name: str) -> dict[str, Any]:
        """The dataset.json of a source: `splits` with counts and shards, `dropped` by reason, and where it is from."""
        return shards.describe(self.sources[name])


def prepare(
    data: DataSection, tokenizer: TokenizerSection, log: Log = print, shard_tokens: int = SHARD_TOKENS
) -> Prepared:
    """Make whatever shards, and tokenizer, of `data` are not there yet.

    Raises:
        sources.SourceError: a source cannot be read, or has no documents.
        TokenizerError: the named tokenizer cannot be loaded.
        OSError: the disk is full, or `data.shards` cannot be written.
    """
    root = Path(data.shards)
    _sum.cache_clear()
    inputs = {name: _inputs(name, data) for name in data.sources}
    with contextlib.ExitStack() as held:
        workers = held.enter_context(Workers(data.workers))
        documents = {}
        for name, source in data.sources.items():
            work = root / f".work-{name}-{_fingerprint({**inputs[name], 'pieces': sources.LAYOUT})}"
            documents[name] = Documents(name, source, data, work, workers, log)
            held.callback(documents[name].close)
        if tokenizer.path is None:
            chosen = _own_tokenizer(root, documents, inputs, tokenizer.vocab_size, log)
        else:
            chosen = Tokenizer.load(tokenizer.path)
        paths = {}
        for name in data.sources:
            about = {**inputs[name], "tokenizer": chosen.fingerprint}
            about |= _begin(chosen)
            if data.sources[name].conversations:
                about["chat_template"] = _manner(_chat_format(name, chosen))
            paths[name] = root / f"{name}-{_fingerprint(about)}"
            with _to_be_made(name, paths[name], log) as missing:
                if missing:
                    with _work(documents[name]):
                        _write_source(paths[name], documents[name], about, chosen, shard_tokens, log)
            _tidy(documents[name].work)
    return Prepared(chosen, paths)


def _tidy(work: Path) -> None:
    """Remove the work on a source whose shards are there, unless somebody is using it to make others."""
    lock = filelock.FileLock(work.parent / ".lock")
    if work.exists():
        with contextlib.suppress(filelock.Timeout), lock.acquire(timeout=0):
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _work(documents: Documents) -> Iterator[None]:
    """Around the work on one source: what was left of it with other options goes first; what came of content that is
    of no use goes at the end, but for what was downloaded. Whatever else interrupts it, what is done so far stays."""
    mine = documents.work
    for other in mine.parent.glob(f".work-{glob.escape(documents.name)}-????????????"):
        if other != mine:
            shutil.rmtree(other, ignore_errors=True)
    try:
        yield
    except (sources.BadContentError, OverflowError):
        documents.close()
        documents.forget()
        raise
    finally:
        documents.close()


def _begin(tokenizer: Tokenizer) -> dict[str, int]:
    """The token that is read before each document, where it is another one than the end of the document before."""
    return {} if tokenizer.begin_of_text == tokenizer.end_of_text else {"begin_of_text": tokenizer.begin_of_text}


def _manner(chat: ChatFormat) -> str:
    """What tells how conversations are stored from any other way."""
    return chat.fingerprint + ("-without-begin" if chat.writes_begin else "")


def _chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """How conversations are written for `tokenizer`. Raises TokenizerError where they cannot be."""
    try:
        return ChatFormat(tokenizer)
    except TokenizerError as error:
        raise TokenizerError(f"data.sources.{name} has conversations: {error}") from error


def _inputs(name: str, data: DataSection) -> dict[str, Any]:
    """All that decides which documents a source gives. Folders' names do not: a corpus may move. What is only said of
    some sources leaves the fingerprints of all others as they were."""
    source = data.sources[name]
    if source.valid_from is not None:
        valid = {"from": _content(name, source.valid_from, data)}
    elif source.is_embedded:
        valid = {"documents": valid_count(source)}
    else:
        valid = {"fraction": data.valid_fraction}
    return {
        "code": CODE_VERSION,
        "from": _content(name, source.from_, data),
        "valid": valid,
        "field": source.field,
        "documents": source.documents,
        "part": source.part,
        "min_characters": data.min_characters,
        "filters": settings.as_plain(data.filters),
        "near_duplicates": data.near_duplicates,
        "evaluation_sets": {other: _asked(other, part, data) for other, part in data.evaluation_sets.items()},
        **({"conversations": conversations.VERSION} if source.conversations else {}),
    }


def _asked(name: str, section: EvaluationSet, data: DataSection) -> list[Any]:
    """What decides which questions an evaluation set holds."""
    split = [section.split] if section.from_.startswith("hub:") else []  # files have no sides
    return [_content(name, section.from_, data), section.field, *split]


def _check_unchanged(documents: Documents, inputs: dict[str, Any]) -> None:
    """Raises sources.BadContentError if the files of a source are not those that `inputs` tells of any more."""
    _sum.cache_clear()
    try:
        same = _inputs(documents.name, documents.data).items() <= inputs.items()
    except (FileNotFoundError, sources.SourceError):
        same = False
    if not same:
        raise sources.BadContentError(f"data.sources.{documents.name}: its files changed while they were read: start "
                                      "again when they are complete")  # fmt: skip


def _content(name: str, source: str, data: DataSection) -> dict[str, Any]:
    kind, rest = sources.parse(source)
    if kind == "embedded":
        return {"kind": kind, "corpus": rest, "seed": data.seed, "version": embedded.VERSION}
    paths = sources.files(source)
    if not paths and kind != "hub":
        raise sources.SourceError(f"data.sources.{name}: {source} names no file: name one, or a pattern that matches")
    if not paths:
        return {"kind": kind, "dataset": rest}  # asking the Hub for its content would need the network at every start
    digests = [{"bytes": path.stat().st_size, "sha256": _sum(path)} for path in paths]
    if kind == "hub":  # in a data set's folder, names tell the splits
        digests = [
            {"name": str(path.relative_to(Path(rest).expanduser())), **digest}
            for path, digest in zip(paths, digests, strict=True)
        ]
    return {"kind": kind, "files": digests}


@functools.lru_cache(100_000)
def _sum(path: Path) -> str:
    """The sha256 of a file, worked out once for all sources that share it, anew in every preparation."""
    return folder.sha256(path)


def _fingerprint(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _to_be_made(name: str, path: Path, log: Log) -> Iterator[bool]:
    """Whether the folder at `path` has to be made; while the block runs, no other preparation makes any beside it.

    A bad folder is moved out of the way, loudly. What is there and verifies needs no lock, nor a writable disk.
    """
    if path.exists() and not folder.verify(path):
        log(f"{name}: already prepared in {path}")
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.parent / ".lock")  # the system lets go of it when its holder dies
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"{name}: waiting for another preparation in {path.parent}")
        lock.acquire()
    with contextlib.ExitStack() as held:
        held.callback(lock.release)
        problems = folder.verify(path) if path.exists() else []
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            log(f"WARNING: {problems[0]}{more}: moved to {folder.set_aside(path)}, {name} is prepared again")
        yield not path.exists()


def _own_tokenizer(
    root: Path, documents: dict[str, Documents], inputs: dict[str, Any], vocab_size: int, log: Log
) -> Tokenizer:
    """The tokenizer trained on a sample of the training documents of all sources, as a folder beside the shards."""
    wanted = {
        "code": CODE_VERSION,
        "sources": sorted(inputs.values(), key=_fingerprint),
        "vocab_size": vocab_size,
        "bytes": SAMPLE_BYTES,
    }
    path = root / f"tokenizer-{_fingerprint(wanted)}"
    with _to_be_made("tokenizer", path, log) as missing:
        if missing:
            sample: list[str] = []
            for name in sorted(documents, key=lambda name: _fingerprint(inputs[name])):
                with _work(documents[name]):
                    sample += _sample(documents[name], SAMPLE_BYTES // len(documents))
                    _check_unchanged(documents[name], inputs[name])
            megabytes = sum(len(text.encode()) for text in sample) / 1e6
            log(f"tokenizer: training up to {vocab_size:,} entries on {megabytes:.1f} MB, {len(sample):,} documents")
            with folder.write(path) as temporary:
                Tokenizer.train(sample, vocab_size).save(temporary)
    return Tokenizer.load(path)


def _sample(documents: Documents, budget: int) -> list[str]:
    """Training documents of `budget` bytes in all: those of the lowest hashes, hence a fair sample in any order.

    A generator's documents are alike throughout, and a Hub data set may be many times larger than the sample: of both,
    the first documents are taken.
    """
    takes_first = documents.source.from_.startswith(("embedded:", "hub:"))
    heap: list[tuple[int, str, int]] = []  # the highest hash on top
    size = 0
    for side, text in documents:
        if side != "train":
            continue
        cut = conversations.contents_of(text)[:budget]  # a whole book of one document must not fill the memory
        length = len(cut.encode())
        heapq.heappush(heap, (-int.from_bytes(clean.key_of(text)[8:], "big"), cut, length))
        size += length
        if takes_first and size >= budget:
            break
        while size > budget and len(heap) > 1:
            size -= heapq.heappop(heap)[2]
    return [text for _, text, _ in sorted(heap, reverse=True)]


def _write_source(
    path: Path, documents: Documents, inputs: dict[str, Any], tokenizer: Tokenizer, shard_tokens: int, log: Log
) -> None:
    name, started = documents.name, time.monotonic()
    log(f"{name}: preparing {documents.source.from_}")
    dtype = shards.token_dtype(tokenizer.vocab_size)
    selection = documents.selection
    parts = _tokenised(documents, tokenizer, log)
    refused = sum(shards.describe(part).get("refused", 0) for part in parts)
    with folder.write(path) as temporary:
        splits = {split: shards.join(parts, temporary, split, dtype, shard_tokens) for split in ("train", "valid")}
        description = {
            "name": name,
            "source": documents.source.from_,
            "valid_source": documents.source.valid_from,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "end_of_text": tokenizer.end_of_text,
            **_begin(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            "splits": splits,
            "dropped": {**selection.dropped(), **({REFUSED: refused} if refused else {})},
            "inputs": inputs,
        }
        if selection.held_out_end is not None:
            description["held_out_end"] = dict(zip(("characters", "of"), selection.held_out_end, strict=True))
        special = tokenizer.special_tokens.values()
        description["special_tokens"] = shards.special_tokens(temporary, description, special)
        (temporary / shards.DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
        if selection.first_malformed():
            with open(temporary / shards.QUARANTINE, "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in selection.quarantine())
        _check_unchanged(documents, inputs)
    for line in documents.report() + ([f"{refused:,} {REFUSED}"] if refused else []):
        log(f"{name}: dropped {line}")
    if selection.first_malformed():
        log(f"{name}: all malformed rows are listed in {path / shards.QUARANTINE}")
    if told := shards.end_held_out(description):
        log(f"{name}: {told}")
    if not splits["valid"]["documents"]:
        log(f"WARNING: {name} has no validation documents{_why_none(documents)}: give it `valid_from`, more documents "
            "or more valid_fraction")  # fmt: skip
    tokens = sum(split["tokens"] for split in splits.values())
    log(f"{name}: {tokens:,} tokens in {path} after {time.monotonic() - started:.1f} s")


def _why_none(documents: Documents) -> str:
    if documents.source.conversations:
        return " (conversations are not cut, and a teacher's traces have none: the job left its dev part out)"
    return " (all are too short for an end to be held out)" if documents.data.valid_fraction else ""


def _tokenised(documents: Documents, tokenizer: Tokenizer, log: Log) -> list[Path]:
    """The folders of tokens of every piece, made by as many processes as are worth it."""
    selection, work = documents.selection, documents.work
    template = ""
    if documents.source.conversations:
        chat = ChatFormat(tokenizer)
        template = _manner(chat).replace(chat.fingerprint, f"-{chat.fingerprint[:12]}")
    text = work / f"tokenizer-{tokenizer.fingerprint[:12]}{template}"
    if not text.exists():
        with folder.write(text) as temporary:
            tokenizer.save(temporary)
    parts = [work / f"tokens-{text.name.removeprefix('tokenizer-')}-{number:05d}" for number in range(selection.done)]
    masked = documents.source.conversations
    jobs = ((documents.table(number), selection.answers(number), selection.cut(number), text, masked, part)
            for number, part in enumerate(parts))  # fmt: skip
    last = time.monotonic()
    done = documents.workers.map(write_tokens.write_tokens, jobs, documents.is_large(selection.pieces))
    for number, _ in enumerate(done, start=1):
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            log(f"{documents.name}: {number} of {len(parts)} pieces tokenised")
    return parts


def table(prepared: Prepared) -> str:
    """What there is of each source, for people. Bytes per token count text alone, without the end-of-text tokens."""
    rows = [("source", "split", "documents", "tokens", "bytes/token", "dropped")]
    for name in prepared.sources:
        description = prepared.describe(name)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in description["dropped"].items()) or "-"
        for split, counts in description["splits"].items():
            text_tokens = counts["tokens"] - counts["documents"]
            rate = f"{counts['bytes'] / text_tokens:.3f}" if text_tokens else "-"
            rows.append((name, split, f"{counts['documents']:,}", f"{counts['tokens']:,}", rate, dropped))
            name, dropped = "", ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = "<<>>><"
    lines = ("  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _summary(prepared: Prepared) -> dict[str, Any]:
    tokenizer = {"fingerprint": prepared.tokenizer.fingerprint, "vocab_size": prepared.tokenizer.vocab_size}
    described = {name: {"path": str(path), **prepared.describe(name)} for name, path in prepared.sources.items()}
    return {"tokenizer": tokenizer, "sources": described}


def _with_remedy(error: OSError, root: str) -> str:
    """What the system says, where that was if it does not say, and what to do."""
    if error.errno is None or error.errno == errno.ENOMEM:  # the message says it all
        return error.strerror or str(error)
    where = "" if error.filename else f" (in {root})"
    return f"{error}{where}: make room or make it writable; the same command goes on from there"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="config.yaml", help="YAML file with a `data` section (config.yaml)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; messages go to stderr")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the config file")
    args = parser.parse_args(arguments)
    try:
        config = settings.load(Config, args.config, args.overrides, only=("data", "tokenizer"))
        log = lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True)  # noqa: E731
        prepared = prepare(config.data, config.tokenizer, log)
        print(json.dumps(_summary(prepared)) if args.json else table(prepared))
    except settings.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (sources.SourceError, TokenizerError) as error:
        print(f"not prepared: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"not prepared: {_with_remedy(error, config.data.shards)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interruption.MESSAGE, file=sys.stderr)
        return interruption.INTERRUPTED
    return 0


if __name__ == "__main__":
    process.outlive_readers()
    interruption.interrupt_once()
    sys.exit(main())
