"""What do fewer bits cost? python -m benchmarks.export_quality --checkpoint runs/tinystories-cpu --json FILE

For each way of quantising a Core ML package: the size of weight.bin beside fp16's, and the held-out loss of the model
with the package's own weights beside the checkpoint's, on the same text. Exit code 1: int8 is above 0.55 of fp16's size
or 0.01 nat worse, or four bits are above 0.33. The loss of four bits is reported; 0.1 nat is the aim.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import result

if TYPE_CHECKING:
    import torch

KINDS = ("none", "int8", "int4", "palette4")
SIZES = {"int8": 0.55, "int4": 0.33, "palette4": 0.33}
LOSS = {"int8": 0.01}  # nats a token


def main() -> int:
    """Convert in every way, measure size and loss."""
    parser = result.parser(__doc__)
    parser.add_argument("--checkpoint", default="runs/tinystories-cpu", help="trained on real text (%(default)s)")
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/tinystories/valid.jsonl"),
                        help="held-out documents, a JSON object with `text` a line (%(default)s)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=100_000, help="of them (%(default)s)")
    arguments = parser.parse_args()
    import torch

    from export import coreml, trained
    from export.check import holding
    from export.mil import Package

    of = trained.load(arguments.checkpoint)
    rows: list[dict[str, Any]] = []
    documents = _documents(of, arguments.texts, arguments.tokens)
    exact = _loss(of.model, documents)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = coreml.convert(of.model, never=of.never)
        for kind in KINDS:
            path = Path(folder) / f"{kind}.mlpackage"
            (program if kind == "none" else coreml.quantize(program, kind)).save(str(path))
            held = holding(Package(path), of.model, None if kind == "none" else kind)
            size, loss = next(path.rglob("weight.bin")).stat().st_size, _loss(held, documents)
            whole = rows[0]["weight_bytes"] if rows else size
            rows.append({"weights": kind, "weight_bytes": size, "of_fp16": size / whole,
                         "held_out_loss": loss, "above_the_checkpoint": loss - exact,
                         "bits_a_parameter": 8 * size / of.config.parameters()["total"]})  # fmt: skip
            print(result.table(rows[-1:]), flush=True)
    print(f"\n{result.table(rows)}\nthe checkpoint: {exact:.4f} nats a token, {sum(map(len, documents)):,} tokens")
    held_out = {"checkpoint_loss": exact, "tokens": sum(map(len, documents)), "parameters": of.config.parameters()}
    result.write("export_quality", rows, arguments.json, checkpoint=Path(arguments.checkpoint).name, **held_out)
    right = [row["of_fp16"] <= SIZES.get(row["weights"], 1) for row in rows]
    right += [row["above_the_checkpoint"] <= LOSS.get(row["weights"], float("inf")) for row in rows]
    return 0 if all(right) else 1


def _documents(of: Any, file: Path, tokens: int) -> list[list[int]]:
    """Ids of whole documents, each behind what begins a text and as far as the context goes, of so many tokens."""
    documents, count = [], 0
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            ids = (of.begin + of.tokenizer.encode(json.loads(line)["text"]))[: of.config.context]
            documents.append(ids)
            count += len(ids)
            if count >= tokens:
                break
    return documents


def _loss(model: "torch.nn.Module", documents: list[list[int]]) -> float:
    """Nats a token, the first of each document not counted."""
    import torch
    import torch.nn.functional as F

    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in documents:
            logits = model(torch.tensor([ids]))[0, :-1]
            total += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            tokens += len(ids) - 1
    return total / tokens


if __name__ == "__main__":
    sys.exit(main())
