"""What every benchmark shares: its arguments, the circumstances of a measurement, a table, and the JSON file."""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from observe.hardware import environment


def parser(doc: str) -> argparse.ArgumentParser:
    """A benchmark's arguments, `--json FILE` among them."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return made


def write(name: str, rows: Any, path: Path | None, **details: Any) -> None:
    """Write `rows` with command, commit, machine, versions and date to `path`, if there is one."""
    if path is None:
        return
    command = f"python -m benchmarks.{name} {shlex.join(sys.argv[1:])}".strip()
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    record = {"benchmark": name, "command": command, "date": when, "environment": environment(), **details}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with equal keys as an aligned table."""
    if not rows:
        return "(nothing)"
    keys = list(rows[0])
    cells = [keys, *([_text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(keys))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)
