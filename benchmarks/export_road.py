"""Does what reaches the phone write what the checkpoint writes? python -m benchmarks.export_road --json FILE

The road of a user after `make train`: the finished run, the same tuned for a moment on conversations
(configs/chat.yaml) and on worked problems (configs/gsm8k-rationales.yaml), each through convert.py. What the folder's
package writes, with the folder's own tokenizer, chat template and stop tokens, in swift-transformers' order of calls,
is laid beside what generate.py writes, greedily. Exit code 1: a text differs, the contract has a problem, or the report
lacks something.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import result

PROMPTS = ("Once upon a time", "One day Tom", "First Tom has 5 apples. Next Tom buys 4.")
QUESTIONS = ("What is the sun?", "How many legs do two dogs have?", "Tell me a story.")
TOKENS = 60
TOLD = ("contract", "weight_bytes", "parity", "not_verified", "tokenizer", "files", "model")


def main() -> int:
    """Tune, convert, write both texts, compare."""
    parser = result.parser(__doc__)
    parser.add_argument("--checkpoint", default="runs/default", help="a finished run (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of texts (%(default)s)")
    parser.add_argument("--tuning-tokens", type=int, default=65_536, help="positions of each tuning (%(default)s)")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        _tune(arguments, runs, "chat", "configs/chat.yaml", [
            f"data.sources.talk.from=jsonl:{arguments.data / 'chat' / 'dolly_15k.jsonl'}",
            f"data.sources.textbooks.from=jsonl:{arguments.data / 'textbooks' / 'train.jsonl'}",
            f"data.sources.textbooks.valid_from=jsonl:{arguments.data / 'textbooks' / 'valid.jsonl'}"])  # fmt: skip
        _tune(arguments, runs, "rationales", "configs/gsm8k-rationales.yaml", [
            "data.evaluation_sets={}", f"data.sources.gsm8k.from=jsonl:{arguments.data / 'gsm8k' / 'train.jsonl'}",
            f"data.sources.replay.from=jsonl:{arguments.data / 'textbooks' / 'train.jsonl'}"])  # fmt: skip
        for checkpoint in (arguments.checkpoint, str(runs / "chat"), str(runs / "rationales")):
            for quantize in ("none", "int8") if checkpoint == arguments.checkpoint else ("none",):
                out = Path(folder) / f"{Path(checkpoint).name}-{quantize}"
                rows.append(_road(checkpoint, out, quantize))
                print(result.table(rows), flush=True)
    result.write("export_road", rows, arguments.json)
    exact = [row for row in rows if row["quantize"] == "none"]
    right = all(row["equal"] == row["asked"] for row in exact) and not any(
        row["contract_problems"] or row["missing_of_the_report"] for row in rows
    )
    return 0 if right else 1


def _tune(arguments: Any, runs: Path, name: str, config: str, overrides: list[str]) -> None:
    """A moment of a tuning recipe on the finished run, whose shape and tokenizer it takes."""
    from checkpoints import locate, read_shape

    shape = dataclasses.asdict(read_shape(locate(arguments.checkpoint)))
    shape = [f"model.{key}={'null' if value is None else value}" for key, value in shape.items()]
    _run("accelerate.commands.launch", "--num_processes", "1", "multigpu_train.py", "--config", config, *shape,
         *overrides, f"run.init_from={arguments.checkpoint}", f"run.folder={runs}", f"run.name={name}",
         f"data.shards={runs.parent / 'shards'}", "phases.0.context=512", "phases.0.batch_tokens=4096",
         "phases.0.micro_batch=2", f"phases.0.tokens={arguments.tuning_tokens}", "evaluation.every_steps=null",
         "evaluation.final_tokens=4096", "watch.wandb=off")  # fmt: skip


def _road(checkpoint: str, out: Path, quantize: str) -> dict[str, Any]:
    """Convert, and compare what both write."""
    from checkpoints import huggingface
    from export import coreml
    from export.mil import Package, Writer
    from tokenizer import Tokenizer
    from tokenizer.conversations import ChatFormat, begun

    began = time.monotonic()
    command = [sys.executable, "convert.py", "--checkpoint", checkpoint, "--to", "coreml", "--out", str(out)]
    subprocess.run([*command, "--quantize", quantize], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    report = json.loads((out / "export_report.json").read_text())
    tokenizer, ends = Tokenizer.load(out), huggingface.end_ids(out)
    package = Package(out / coreml.PACKAGE, "fp16")
    chats = report["model"]["chats"]
    begin, equal, stopped = [tokenizer.begin_of_text], 0, 0
    for text in QUESTIONS if chats else PROMPTS:
        if chats:
            prompt = begun(begin, ChatFormat(tokenizer).prompt([{"role": "user", "content": text}]))
        else:
            prompt = [*begin, *tokenizer.encode(text)]
        new = list(Writer(package).write(prompt, TOKENS, ends))
        stopped += len(new) < TOKENS
        written = tokenizer.decode(new) if chats else text + tokenizer.continuation(prompt, new)
        equal += written.strip() == _generated(checkpoint, text, chats).strip()
    return {
        "checkpoint": Path(checkpoint).name, "quantize": quantize, "chats": chats, "asked": 3, "equal": equal,
        "stopped": stopped, "stop_tokens": len(ends), "contract_problems": coreml.swift_problems(package.program),
        "missing_of_the_report": [key for key in TOLD if key not in report], "seconds": seconds,
        "mean_kl": report["parity"]["against_checkpoint"]["mean_kl"], "weight_bytes": report["weight_bytes"],
    }  # fmt: skip


def _generated(checkpoint: str, text: str, chats: bool) -> str:
    """What generate.py writes, greedily."""
    command = [sys.executable, "generate.py", "--checkpoint", checkpoint, "--temperature", "0",
               "--max-new-tokens", str(TOKENS)]  # fmt: skip
    asked = ["--chat"] if chats else [text]
    return subprocess.run([*command, *asked], check=True, capture_output=True, text=True,
                          input=f"{text}\n" if chats else None).stdout  # fmt: skip


def _run(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
