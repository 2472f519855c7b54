"""How fast, and in how much memory, does text become shards? python -m benchmarks.data_preparation DATA --json FILE

DATA is the folder with the real text. All of it goes through `python -m data.prepare` with near-duplicates removed, and
through what its users would write with `datasets`: load_dataset, map with a batched tokenizer on as many processes,
save_to_disk, which drops nothing. Then ours again on a corpus ten times as large, the text repeated with a third of its
words exchanged, so that the index of near-duplicates on disk really grows. Memory is the most that all processes of one
side held together (proportional set size, polled). Exit code 1: ten times the text takes over 1.2 times the memory.

    python -m benchmarks.data_preparation --shapes

asks instead whether odd shapes of a corpus cost more than their bytes: 500, 2,000 and 8,000 text files beside one file
of JSON lines with the same stories (generated; with DATA those of TinyStories), and tokenizers trained on stories of
which one line is a run without a break, of 25 to 200 kB, of DNA's letters, emoji or Chinese. `of_stories` are seconds
beside those of the stories without the run. Exit code 1: the 8,000 files take over 3 times their single file's seconds,
or over 30 s; or eight times the run takes over 16 times the seconds.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import result
from data import embedded
from machine.process import usable_cores

ALLOWED = 1.2  # times the memory for ten times the text
EXCHANGED = 1 / 3  # of the words, in each copy
FILES, TIMES_ONE_FILE, MOST_SECONDS = (500, 2_000, 8_000), 3.0, 30.0
KILOBYTES, TIMES_LINEAR = (25, 50, 100, 200), 2.0
RUNS = {  # the signs they are drawn from
    "DNA": "ACGT", "emoji": "".join(map(chr, range(0x1F600, 0x1F650))),
    "Chinese": "".join(map(chr, range(0x4E00, 0x4E00 + 3_000))),
}  # fmt: skip
TEXTS = {  # file: fields that together are a document
    "tinystories/train.jsonl": ("text",),
    "tinystories/valid.jsonl": ("text",),
    "textbooks/train.jsonl": ("text",),
    "textbooks/valid.jsonl": ("text",),
    "gsm8k/train.jsonl": ("question", "answer"),
    "chat/dolly_15k.jsonl": ("instruction", "context", "response"),
}


def main() -> int:
    """Write the corpora, measure the sides in turns, print and write the table."""
    parser = result.parser(__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder with tinystories/, textbooks/, gsm8k/ and chat/")
    parser.add_argument("--shapes", action="store_true", help="many files, and runs without a break, instead")
    parser.add_argument("--times", type=int, default=10, help="size of the larger corpus (10)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.shapes:
        return shapes(arguments)
    if arguments.data is None:
        parser.error("name the folder with the real text, or --shapes")
    with tempfile.TemporaryDirectory(prefix="preparation-") as name:
        root = Path(name)
        small, large = root / "small.jsonl", root / "large.jsonl"
        texts = list(_documents(arguments.data))
        small.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with open(large, "w") as file:
            for copy in range(arguments.times):
                file.writelines(json.dumps({"text": _edited(text, copy)}) + "\n" for text in texts)
        tokenizer = _tokenizer(root, texts)
        sides: dict[str, Callable[[Path], list[str]]] = {
            "ours": lambda folder: _ours(folder, f"jsonl:{small}", tokenizer, near_duplicates=0.8),
            "datasets.map": lambda folder: _theirs(folder, small, tokenizer),
            f"ours, {arguments.times} times the text": lambda folder: _ours(
                folder, f"jsonl:{large}", tokenizer, near_duplicates=0.8
            ),
        }
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(arguments.repeats):
            for side, command in sides.items():
                folder = root / f"{len(runs[side])}-{number}-{side.replace(' ', '')}"
                folder.mkdir()
                runs[side].append(measured(command(folder)))
        bytes_ = {side: (large if "times" in side else small).stat().st_size for side in sides}
    rows = summarised(runs, bytes_)
    print(result.table(rows))
    result.write("data_preparation", rows, arguments.json, processes=usable_cores())
    return 0 if rows[-1]["memory_of_ours"] <= ALLOWED else 1


def shapes(arguments: argparse.Namespace) -> int:
    """Measure both odd shapes, print and write the tables."""
    texts = _stories(arguments.data, max(FILES))
    with tempfile.TemporaryDirectory(prefix="shapes-") as name:
        of_files = [_files_beside_one(Path(name), texts, count, arguments.repeats) for count in FILES]
    print(result.table(of_files))
    plain = _seconds_to_train(None, 0, arguments)
    of_runs = [{"run": kind, "kilobytes": size, **_beside(_seconds_to_train(kind, size, arguments), plain)}
               for kind in RUNS for size in KILOBYTES]  # fmt: skip
    print(result.table(of_runs))
    result.write("data_preparation", of_files + of_runs, arguments.json, processes=usable_cores())
    largest = of_files[-1]
    grows = max(found["seconds"] / least["seconds"]
                for least, found in zip(of_runs[:: len(KILOBYTES)], of_runs[len(KILOBYTES) - 1 :: len(KILOBYTES)],
                                        strict=True))  # fmt: skip
    is_slow = largest["times_one_file"] > TIMES_ONE_FILE or largest["seconds"] > MOST_SECONDS
    return 1 if is_slow or grows > TIMES_LINEAR * KILOBYTES[-1] / KILOBYTES[0] else 0


def _stories(data: Path | None, count: int) -> list[str]:
    if data is None:
        return list(embedded.documents("stories", "train", count, seed=1))
    with open(data / "tinystories/train.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]


def _files_beside_one(root: Path, texts: list[str], count: int, repeats: int) -> dict[str, Any]:
    """Seconds to prepare so many stories, each in a file of its own, and all in one; medians, in turns."""
    folder, one = root / f"{count}", root / f"{count}.jsonl"
    folder.mkdir()
    for number, text in enumerate(texts[:count]):
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    one.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]), encoding="utf-8")
    tokenizer = root / "tokenizer"
    if not tokenizer.exists():
        _tokenizer(root, texts)
    found: dict[str, list[dict[str, float]]] = {f"text:{folder}/*.txt": [], f"jsonl:{one}": []}
    for number in range(repeats):
        for side, (source, runs) in enumerate(found.items()):
            work = root / f"{count}-{number}-{side}"
            work.mkdir()
            runs.append(measured(_ours(work, source, tokenizer)))
    many, single = ({key: result.median([run[key] for run in runs]) for key in ("seconds", "cpu_seconds")}
                    for runs in found.values())  # fmt: skip
    return {
        "files": count, "megabytes": one.stat().st_size / 1e6, "seconds": many["seconds"],
        "seconds_of_one_file": single["seconds"], "times_one_file": many["seconds"] / single["seconds"],
        "cpu_seconds": many["cpu_seconds"], "cpu_seconds_of_one_file": single["cpu_seconds"],
    }  # fmt: skip


def _seconds_to_train(kind: str | None, kilobytes: int, arguments: argparse.Namespace) -> list[float]:
    data = None if arguments.data is None else str(arguments.data)
    return [result.isolated(train_on_run, kind=kind, kilobytes=kilobytes, data=data)["seconds"]
            for _ in range(arguments.repeats)]  # fmt: skip


def train_on_run(kind: str | None, kilobytes: int, data: str | None) -> dict[str, Any]:
    """Seconds to train a tokenizer on stories and one line that is a run without a break."""
    from tokenizer import Tokenizer

    texts = _stories(Path(data) if data else None, 2_000)
    if kind is not None:
        signs = RUNS[kind]
        texts.append("".join(random.Random(1).choices(signs, k=kilobytes * 1000 // len(signs[0].encode()))))
    began = time.monotonic()
    Tokenizer.train(texts, 4096)
    return {"seconds": time.monotonic() - began}


def _beside(seconds: list[float], plain: list[float]) -> dict[str, float]:
    found = result.median(seconds)
    return {"seconds": found, "spread": result.spread(seconds), "of_stories": found / result.median(plain)}


def summarised(runs: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """One row a side: medians."""
    base = result.median([run["memory"] for run in runs["ours"]])
    return [
        {
            "side": side,
            "megabytes": sizes[side] / 1e6,
            "seconds": result.median([run["seconds"] for run in found]),
            "mb_per_second": sizes[side] / 1e6 / result.median([run["seconds"] for run in found]),
            "spread": result.spread([run["seconds"] for run in found]),
            "peak_mib": result.median([run["memory"] for run in found]) / 2**20,
            "memory_of_ours": result.median([run["memory"] for run in found]) / base,
        }
        for side, found in runs.items()
    ]


def measured(command: list[str]) -> dict[str, float]:
    """Seconds of a command, on the clock and of all cores, and the most memory that it and all its children held
    together."""
    before, began = _cpu_seconds(), time.monotonic()
    process = subprocess.Popen(command, cwd=result.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    words: list[str] = []
    reader = threading.Thread(target=lambda: words.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{words[0][-2000:]}")
    seconds = time.monotonic() - began
    return {"seconds": seconds, "cpu_seconds": _cpu_seconds() - before, "memory": peak}


def _cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> int:
    total = 0
    try:
        whole = psutil.Process(pid)
        for process in [whole, *whole.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # it has just ended
        pass
    return total


def _documents(data: Path) -> Iterator[str]:
    for name, fields in TEXTS.items():
        with open(data / name, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield "\n".join(str(row[field]) for field in fields if row.get(field))


def _edited(text: str, copy: int) -> str:
    if copy == 0:
        return text
    draw = random.Random(f"{copy} {text[:100]}")
    words = text.split(" ")
    for _ in range(int(len(words) * EXCHANGED)):
        one, other = draw.randrange(len(words)), draw.randrange(len(words))
        words[one], words[other] = words[other], words[one]
    return " ".join(words)


def _tokenizer(root: Path, texts: list[str]) -> Path:
    from tokenizer import Tokenizer

    Tokenizer.train(texts[:20_000], 4096).save(root / "tokenizer")
    return root / "tokenizer"


def _ours(folder: Path, source: str, tokenizer: Path, **data: Any) -> list[str]:
    config = {
        "data": {"shards": str(folder / "shards"), "sources": {"text": {"from": source}}, **data},
        "tokenizer": {"path": str(tokenizer)},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "data.prepare", "--config", str(path)]


def _theirs(folder: Path, corpus: Path, tokenizer: Path) -> list[str]:
    script = f"""
import datasets
from tokenizers import Tokenizer
encoder = Tokenizer.from_file({str(tokenizer / "tokenizer.json")!r})
def encode(rows):
    return {{"ids": [found.ids for found in encoder.encode_batch(rows["text"])]}}
if __name__ == "__main__":
    rows = datasets.load_dataset("json", data_files={str(corpus)!r}, split="train", cache_dir={str(folder / "cache")!r})
    rows = rows.map(encode, batched=True, num_proc={usable_cores()}, remove_columns=["text"])
    rows.save_to_disk({str(folder / "tokens")!r})
"""
    path = folder / "theirs.py"
    path.write_text(script)
    return [sys.executable, str(path)]


if __name__ == "__main__":
    sys.exit(main())
