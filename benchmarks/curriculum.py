"""Does a run learn what its phases are there to teach? python -m benchmarks.curriculum --config FILE --json FILE

Runs a config from nothing through `accelerate launch` and reports, for each phase, the validation loss of each source
beside that of a Kneser-Ney bigram model with the same tokenizer and text, and what the phase's probes answered before
and after it. With --finished RUN it reports on a run that is there already. Exit code 1: the run failed.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import result
from observe.history import History


def main() -> int:
    """Run, read the metrics, print and write the tables."""
    parser = result.parser(__doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--finished", type=Path, metavar="RUN", help="report on this run's folder; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    began = time.monotonic()
    if arguments.finished is None:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "multigpu_train.py",
            "--config",
            arguments.config,
        ]
        if subprocess.run([*command, *arguments.overrides]).returncode:
            return 1
        wall_seconds = time.monotonic() - began
        folder = _run_folder(arguments.config, arguments.overrides)
    else:
        wall_seconds, folder = None, arguments.finished
    history = History(folder)
    losses, probes = loss_rows(history), probe_rows(history)
    print(f"\n{result.table(losses)}\n\n{result.table(probes)}")
    rows = {"validation": losses, "probes": probes}
    details = {"config": history.config, "wall_seconds": wall_seconds, "run_seconds": history.seconds}
    result.write("curriculum", rows, arguments.json, **details)
    return 0


def loss_rows(history: History) -> list[dict[str, object]]:
    """Validation loss by phase and source at the phase's end, and how far below the bigram model's it is (nats)."""
    floors = {(event["phase"], event["source"]): event["loss"] for event in history.events("bigram_floor")}
    rows = []
    for phase in history.phases:
        for source, losses in (phase.validation or {}).get("sources", {}).items():
            floor = floors.get((phase.name, source))
            rows.append(
                {
                    "phase": phase.name,
                    "context": phase.context,
                    "source": source,
                    "val_loss": losses["val_loss"],
                    "bits_per_byte": losses["bits_per_byte"],
                    "bigram_loss": floor,
                    "below_bigram": None if floor is None else floor - losses["val_loss"],
                }
            )
    return rows


def probe_rows(history: History) -> list[dict[str, object]]:
    """Held-out questions answered before and after each phase, with 95% intervals."""
    rows = []
    for probe in history.probes:
        row: dict[str, object] = {"probe": probe.name, "phase": probe.phase}
        for when, record in (("before", probe.before), ("after", probe.after)):
            if record is not None:
                row[when] = f"{record['accuracy']:.1%} [{record['low']:.1%}, {record['high']:.1%}]"
        rows.append(row)
    return rows


def _run_folder(config: str, overrides: list[str]) -> Path:
    from settings import read, validate
    from training.settings import RunConfig

    return validate(RunConfig, read(config, overrides)).run.path


if __name__ == "__main__":
    sys.exit(main())
