"""What every benchmark shares: its arguments, a process of its own for each measurement, a table, and the JSON file."""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine.hardware import environment
from storage import folder

ROOT = Path(__file__).resolve().parent.parent


def parser(doc: str) -> argparse.ArgumentParser:
    """A benchmark's arguments, `--json FILE` among them."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return made


def write(name: str, rows: Any, path: Path | None, **details: Any) -> None:
    """Write `rows` with command, commit, machine, versions and date to `path`, if there is one."""
    if path is None:
        return
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]  # no folder of this machine
    command = f"python -m benchmarks.{name} {shlex.join(words)}".strip()
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    about = {key: value for key, value in environment().items() if key != "command"}  # which would say it again
    record = {"benchmark": name, "command": command, "date": when, "environment": about, **details}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.write_file(path, json.dumps({**record, "rows": rows}, indent=1) + "\n")  # whole, however this may end


def isolated(
    measure: Callable[..., dict[str, Any]], prepared: bool = True, threads: int = 1, **arguments: Any
) -> dict[str, Any]:
    """`measure(**arguments)` in a fresh process on so many threads, so that its `peak_memory` (bytes) is its own.

    `measure` is a module's function; arguments and result are JSON. Raises RuntimeError with the process's last words
    if it fails. `prepared`: with what our entry scripts tell a process about its memory (machine/process.py).
    """
    module = measure.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name
    code = (
        f"from machine import process; {'process.prepare()' if prepared else 'pass'}; "
        "import json, sys; from importlib import import_module; from benchmarks import result; "
        f"measured = getattr(import_module({module!r}), {measure.__name__!r})(**json.loads(sys.argv[1])); "
        "print(json.dumps({**measured, 'peak_memory': result.peak_memory()}))"
    )
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    finished = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        cwd=ROOT, env={**os.environ, **limits}, capture_output=True, text=True,
    )  # fmt: skip
    if finished.returncode:
        raise RuntimeError(f"{module}.{measure.__name__}({arguments}) failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def recipe(name: str) -> Any:
    """The RunConfig of configs/NAME.yaml."""
    from settings import read, validate
    from training.settings import RunConfig

    return validate(RunConfig, read(ROOT / "configs" / f"{name}.yaml"))


def recipe_model(name: str, **changes: Any) -> Any:
    """The ModelConfig of configs/NAME.yaml, with changes."""
    import dataclasses

    config = recipe(name)
    shape = config.model.config(config.model.vocab_size or config.tokenizer.vocab_size, config.longest_context)
    return dataclasses.replace(shape, **changes)


def stock_llama(config: Any, **options: Any) -> Any:
    """transformers' Llama of the shape of a ModelConfig, seeing everything; `options` go to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.context, tie_word_embeddings=True, attn_implementation="sdpa", **options,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned table with every key that one of them has."""
    if not rows:
        return "(nothing)"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(keys))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def text(value: Any) -> str:
    """A value of a row, as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)
