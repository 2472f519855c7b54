"""Does tutoring add facts, in words it never saw, and leave the rest? python -m benchmarks.tutoring --json FILE

Trains configs/tutor.yaml from a finished default run: first the chat template with facts of one half and word problems,
the state before; then the tutoring in the facts of the other half, among replay. evaluation.facts asks both states
everything, and the perplexity of held-out stories and word problems, which are the replay. Exit code 1: one of these
does not hold: the held-out wordings of the tutored facts gain 50 points with McNemar's p below 0.01, neither neighbours
nor controls lose more than 5 points, the perplexity of no replay rises by more than 5%.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import result

CONFIG = "configs/tutor.yaml"
REPLAY = ("embedded:stories", "embedded:problems")
GAIN, P, LOSS, RISE = 0.50, 0.01, 0.05, 0.05


def main() -> int:
    """Train, ask both states, compare."""
    parser = result.parser(__doc__)
    parser.add_argument("--checkpoint", default="runs/default", help="a finished default run (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over configs/tutor.yaml")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        common = [f"run.folder={folder}/runs", f"run.init_from={arguments.checkpoint}", "watch.wandb=off",
                  *arguments.overrides]  # fmt: skip
        _run("accelerate.commands.launch", "--num_processes", "1", "multigpu_train.py", "--config", CONFIG, *common)
        trained = time.monotonic() - began
        (run,) = (Path(folder) / "runs").iterdir()
        found = examine(run, Path(folder) / "facts.json")
        seconds = {"train_seconds": trained, "seconds": time.monotonic() - began}
    rows = [*accuracies(found), *perplexities(found)]
    print(result.table(rows))
    claims = held(found)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    result.write("tutoring", rows, arguments.json, held=claims, forgetting=found["baseline"]["forgetting"], **seconds)
    return 0 if all(claims.values()) else 1


def examine(run: Path, file: Path) -> dict[str, Any]:
    """What evaluation.facts finds at the end of the run, and at the end of its first phase."""
    before = run / "checkpoints" / f"step-{_first_phase_end(run):08d}"
    _run("evaluation.facts", "--checkpoint", str(run), "--baseline", str(before), "--replay", *REPLAY,
         "--json", str(file))  # fmt: skip
    return json.loads(file.read_text())


def accuracies(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a set of questions."""
    rows = []
    for name, after in found["sets"].items():
        before, pair = found["baseline"]["sets"][name], found["baseline"]["compared"][name]
        rows.append({
            "asked": name, "questions": after["total"], "before": before["accuracy"], "after": after["accuracy"],
            "low": after["low"], "high": after["high"], "log_probability_before": before["log_probability"],
            "log_probability": after["log_probability"], "mcnemar_p": pair["p"], "flips": after.get("flips"),
        })  # fmt: skip
    return rows


def perplexities(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a text that was replayed."""
    before = found["baseline"]["replay"]
    return [{"asked": source, "before": before[source]["perplexity"], "after": after["perplexity"]}
            for source, after in found["replay"].items()]  # fmt: skip


def held(found: dict[str, Any]) -> dict[str, bool]:
    """Each claim, and whether it holds."""
    rows = {row["asked"]: row for row in [*accuracies(found), *perplexities(found)]}
    change = {name: row["after"] - row["before"] for name, row in rows.items()}
    return {
        f"held-out wordings gain {GAIN:.0%}": change["held_out"] >= GAIN and rows["held_out"]["mcnemar_p"] < P,
        **{f"{name} lose at most {LOSS:.0%}": change[name] >= -LOSS for name in ("neighbours", "controls")},
        **{f"perplexity of {source} rises by at most {RISE:.0%}": change[source] <= RISE * rows[source]["before"]
           for source in REPLAY},
    }  # fmt: skip


def _first_phase_end(run: Path) -> int:
    """The step at which a run's first phase ended."""
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(event["step"] for event in events if event.get("event") == "phase_end")


def _run(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], cwd=result.ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
