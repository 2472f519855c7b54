"""Everything that one GPU can show, in one command: python -m benchmarks.gpu_suite --minutes 10 --json FILE

The sections stand in SECTIONS, in the order of their worth: are the kernels right, does the trainer survive being
killed on this card, is a checkpoint of the card one of the CPU, then how fast is everything. Each row is printed, and
written to FILE, as it comes. With --minutes a section is begun if there is time for what it needs to say anything, and
cut off where the minutes end. --only names sections, --recipes files of configs/ for `training`. Without a GPU the same
checks run small on the CPU; what was skipped is listed with the reason.

Needs what requirements.txt names, of torch 2.11 or newer; `--only teacher` nothing but torch. Exit codes: 0 all checks
hold, 1 one does not, or there was time for none, 128 + number when a signal ended it.
"""

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import result
from benchmarks.device import Findings
from benchmarks.gpu_kernels import attention_rows, decode_rows
from benchmarks.gpu_speed import FIRST, other_recipes, training_rows
from benchmarks.gpu_teacher import teacher_rows
from benchmarks.gpu_trainer import checkpoint_rows, run_kill_resume


class Section(NamedTuple):
    """One function that adds rows to the Findings it is given."""

    name: str
    measure: Callable[[Findings], None]
    seconds: dict[str, float]  # by device: with less time than that left it is not begun


SECTIONS = (
    Section("attention", attention_rows, {"cuda": 90, "cpu": 10}),
    Section("decode", decode_rows, {"cuda": 15, "cpu": 10}),
    Section("run-kill-resume", run_kill_resume, {"cuda": 150, "cpu": 50}),
    Section("checkpoint", checkpoint_rows, {"cuda": 40, "cpu": 3}),
    Section("training", training_rows, {"cuda": 60, "cpu": 5}),
    Section("teacher", teacher_rows, {"cuda": 60, "cpu": 5}),
    Section("other-recipes", other_recipes, {"cuda": 60, "cpu": 0}),
)


def main() -> int:
    """Run the sections, print the tables, write the JSON."""
    names = [section.name for section in SECTIONS]
    parser = result.parser(__doc__)
    parser.add_argument("--minutes", type=float, metavar="N", help="to be done in (as long as it takes)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION",
                        help=f"of {', '.join(names)} (all)")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", default=FIRST, metavar="NAME", help=f"({' '.join(FIRST)})")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what was started here ends as well
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    findings = Findings(device, seconds, lambda findings: write(findings, arguments.json))
    if device.type != "cuda":
        findings.skip("no CUDA device: everything runs small, on the CPU")
    for section in SECTIONS:
        if section.measure is training_rows:
            section = section._replace(measure=functools.partial(training_rows, recipes=arguments.recipes))
        if section.name in arguments.only:
            run(section, findings)
    findings.skip("several cards, NCCL and sharded strategies: one card cannot show them")
    for name, rows in findings.rows.items():
        print(f"\n{name}\n{result.table(rows)}")
    print("\nskipped\n" + "\n".join(f"  {line}" for line in findings.skipped))
    write(findings, arguments.json, whole=True)
    return 0 if holds(findings) else 1


def run(section: Section, findings: Findings) -> None:
    """One section, if there is time for it."""
    needed, left = section.seconds[findings.device.type], findings.left()
    if left < needed:
        findings.skip(f"section {section.name}: needs {needed} s, {max(left, 0):.0f} s were left")
        return
    with findings.section(section.name), findings.measuring(section=section.name):
        section.measure(findings)


def holds(findings: Findings) -> bool:
    """Whether there are rows, and none says that it does not."""
    rows = [row for rows in findings.rows.values() for row in rows]
    return bool(rows) and all(row.get("holds") is not False for row in rows)


def write(findings: Findings, path: Path | None, whole: bool = False) -> None:
    """All that was found so far; `whole` says that nothing is to come."""
    result.write("gpu_suite", findings.rows, path, whole=whole, seconds=findings.seconds, skipped=findings.skipped)


if __name__ == "__main__":
    sys.exit(main())
