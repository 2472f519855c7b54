"""How fast, and in how much memory, does text become shards? python -m benchmarks.data_preparation DATA --json FILE

DATA is the folder with the real text. All of it goes through `python -m data.prepare` with near-duplicates removed, and
through what its users would write with `datasets`: load_dataset, map with a batched tokenizer on as many processes,
save_to_disk, which drops nothing. Then ours again on a corpus ten times as large, the text repeated with a third of its
words exchanged, so that the index of near-duplicates on disk really grows. Memory is the most that all processes of one
side held together (proportional set size, polled). Exit code 1: ten times the text takes over 1.2 times the memory.
"""

import json
import random
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
from machine.process import usable_cores

ALLOWED = 1.2  # times the memory for ten times the text
EXCHANGED = 1 / 3  # of the words, in each copy
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
    parser.add_argument("data", type=Path, help="folder with tinystories/, textbooks/, gsm8k/ and chat/")
    parser.add_argument("--times", type=int, default=10, help="size of the larger corpus (10)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
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
            "ours": lambda folder: _ours(folder, small, tokenizer),
            "datasets.map": lambda folder: _theirs(folder, small, tokenizer),
            f"ours, {arguments.times} times the text": lambda folder: _ours(folder, large, tokenizer),
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
    """Seconds of a command, and the most memory that it and all its children held together."""
    began = time.monotonic()
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
    return {"seconds": time.monotonic() - began, "memory": peak}


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


def _ours(folder: Path, corpus: Path, tokenizer: Path) -> list[str]:
    config = {
        "data": {"shards": str(folder / "shards"), "near_duplicates": 0.8,
                 "sources": {"text": {"from": f"jsonl:{corpus}"}}},
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
