"""Does chat tuning teach a small model to answer and to stop? python -m benchmarks.chat_tuning --json FILE

Three states of one model, a finished run of configs/tinystories-cpu.yaml: as it is, after configs/chat.yaml, and after
as many positions of plain text more, with the same optimizer and schedule. Each is examined by evaluation.chat on the
conversations that were held out. Exit code 1: one of these does not hold: the tuned model's held-out loss is 0.5 nat
below the untuned one's and 0.3 below the plain one's, 90% of its answers stop, at most 1% leak a role.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import result

CONFIG = "configs/chat.yaml"
PLAIN = ["phases.0.data={textbooks: 0.7, tinystories: 0.3}", "phases.0.name=plain"]
GAIN, GAIN_OVER_PLAIN, STOPS, LEAKS = 0.5, 0.3, 0.9, 0.01


def main() -> int:
    """Train both arms, examine all three states, compare."""
    parser = result.parser(__doc__)
    parser.add_argument("--checkpoint", default="runs/tinystories-cpu", help="the run that is tuned (%(default)s)")
    parser.add_argument("--data", default="../shared/data", help="folder of the texts (%(default)s)")
    parser.add_argument("--answers", type=int, default=200, help="of each state (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over configs/chat.yaml")
    arguments = parser.parse_intermixed_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(arguments.data)
        stories = f'data.sources.tinystories={{from: "jsonl:{texts / "tinystories" / "train.jsonl"}"}}'
        talk = f"jsonl:{texts / 'chat' / 'dolly_15k.jsonl'}"
        common = [f"run.folder={folder}/runs", f"run.init_from={arguments.checkpoint}",
                  f"data.sources.talk.from={talk}",
                  f"data.sources.textbooks.from=jsonl:{texts / 'textbooks' / 'train.jsonl'}",
                  f"data.sources.textbooks.valid_from=jsonl:{texts / 'textbooks' / 'valid.jsonl'}", stories,
                  *arguments.overrides]  # fmt: skip
        for state, more in (("before", None), ("plain", PLAIN), ("tuned", [])):
            checkpoint, began = arguments.checkpoint, time.monotonic()
            if more is not None:
                _run("accelerate.commands.launch", "multigpu_train.py", "--config", CONFIG, *common, *more,
                     f"run.name={state}")  # fmt: skip
                checkpoint = f"{folder}/runs/{state}"
            trained = time.monotonic() - began
            found = examine(checkpoint, talk, arguments.answers, Path(folder) / f"{state}.json")
            rows.append({"state": state, **found, "train_seconds": trained})
            print(result.table(rows), flush=True)
    result.write("chat_tuning", rows, arguments.json, held=held(rows))
    return 0 if all(held(rows).values()) else 1


def examine(checkpoint: str, data: str, answers: int, file: Path) -> dict[str, Any]:
    """What evaluation.chat finds on the held-out conversations: those that configs/chat.yaml does not train on."""
    import json

    _run("evaluation.chat", "--checkpoint", checkpoint, "--data", data, "--valid-fraction", str(_valid_fraction()),
         "--answers", str(answers), "--json", str(file))  # fmt: skip
    found = json.loads(file.read_text())
    return {
        "loss": found["loss"], "trained_tokens": found["trained_tokens"], "conversations": found["conversations"],
        **{name: found[name]["share"] for name in ("stops", "role_leaks")},
        "stops_low": found["stops"]["low"], "role_leaks_high": found["role_leaks"]["high"],
    }  # fmt: skip


def held(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Each claim, and whether it holds."""
    loss = {row["state"]: row["loss"] for row in rows}
    tuned = rows[-1]
    return {
        f"{GAIN} nat below before": loss["tuned"] <= loss["before"] - GAIN,
        f"{GAIN_OVER_PLAIN} nat below as many plain tokens more": loss["tuned"] <= loss["plain"] - GAIN_OVER_PLAIN,
        f"stops in {STOPS:.0%}": tuned["stops"] >= STOPS,
        f"leaks a role in at most {LEAKS:.0%}": tuned["role_leaks"] <= LEAKS,
    }


def _valid_fraction() -> float:
    import yaml

    return yaml.safe_load((result.ROOT / CONFIG).read_text())["data"]["valid_fraction"]


def _run(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], cwd=result.ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
