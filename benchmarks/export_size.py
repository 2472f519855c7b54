"""Does a large model fit through the export, and what is it on a phone? python -m benchmarks.export_size --json FILE

Random weights of a recipe's shape go through Core ML conversion and the check, in a process of its own whose peak
memory counts. Beside it, by arithmetic, every recipe's size by precision and the tokens/s that it cannot pass at
60 GB/s, a phone's memory bandwidth: weights and caches are read once a token, and caches written. Exit code 1: the peak
is above 22 GiB, or the check failed.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import result

MOST_GIB = 22
BANDWIDTH = 60e9  # bytes a second
BITS = {"fp16": 16.0, "int8": 8.0, "int4": 4.5, "palette4": 4.0}  # a weight; int4 with an fp16 scale for 32
RECIPES = ("helium-13m", "helium-nano-45m", "smollm-135m", "smolm135", "slm-tinystories", "flow-qwen", "flow-1b")


def main() -> int:
    """Measure one recipe, work out the table of all."""
    parser = result.parser(__doc__)
    parser.add_argument("--config", default="configs/flow-1b.yaml", help="(%(default)s)")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    arguments = parser.parse_args()
    table = [limits(name) for name in RECIPES]
    print(result.table(table), flush=True)
    row = result.isolated(measure, threads=2, config=arguments.config, quantize=arguments.quantize)
    row["peak_gib"] = row["peak_memory"] / 2**30
    print(result.table([{key: value for key, value in row.items() if not isinstance(value, dict)}]))
    result.write("export_size", [row], arguments.json, limits=table)
    return 0 if row["peak_gib"] <= MOST_GIB else 1


def shape_of(config: str) -> Any:
    """The model's shape, of a recipe's file."""
    from settings import read, validate
    from training.settings import RunConfig

    run = validate(RunConfig, read(result.ROOT / config))
    return run.model.config(run.model.vocab_size or run.tokenizer.vocab_size, run.longest_context)


def limits(recipe: str) -> dict[str, Any]:
    """Size by precision and the most tokens/s at a bandwidth, by arithmetic."""
    from export.traced import CacheLayout

    shape = shape_of(f"configs/{recipe}.yaml")
    _, heads, entries, width = CacheLayout.of(shape).shape
    caches = 2 * 2 * 2 * heads * entries * width  # two, fp16, read and written
    row: dict[str, Any] = {"recipe": recipe, "parameters": shape.parameters()["total"], "cache_mb": caches / 2 / 1e6}
    for name, bits in BITS.items():
        size = shape.parameters()["total"] * bits / 8
        row[f"{name}_mb"] = size / 1e6
        row[f"{name}_tokens_s"] = BANDWIDTH / (size + caches)
    return row


def measure(config: str, quantize: str) -> dict[str, Any]:
    """Seconds of each part, and what the check found, for random weights."""
    from export import bundle, coreml
    from export.check import check
    from export.trained import Trained
    from models import build_model
    from tokenizer import Tokenizer

    shape = shape_of(config)
    model = build_model(shape, seed=0).eval().requires_grad_(False)
    tokenizer = Tokenizer.train([" ".join(bundle.GOLDEN_TEXTS.values())], 1024)
    trained = Trained(Path(config), model, tokenizer, shape, [tokenizer.begin_of_text], [tokenizer.end_of_text], [],
                      chats=False)  # fmt: skip
    row: dict[str, Any] = {"config": config, "quantize": quantize, "parameters": shape.parameters()["total"]}
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        package = coreml.convert(model)
        row["convert_seconds"] = time.monotonic() - began
        if quantize != "none":
            package = coreml.quantize(package, quantize)
        path = Path(folder) / coreml.PACKAGE
        package.save(str(path))
        del package
        row["save_seconds"] = time.monotonic() - began - row["convert_seconds"]
        row["weight_bytes"] = next(path.rglob("weight.bin")).stat().st_size
        row["peak_of_conversion_gib"] = result.peak_memory() / 2**30
        began = time.monotonic()
        found = check(path, trained, None if quantize == "none" else quantize)
        row["check_seconds"] = time.monotonic() - began
    return {**row, "positions": found["positions"], "graph_relative": found["graph"]["relative"], "check": found}


if __name__ == "__main__":
    sys.exit(main())
