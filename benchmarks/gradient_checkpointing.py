"""What does recomputing blocks save, at what price? python -m benchmarks.gradient_checkpointing --json FILE

Every recipe at its real depth, window pattern, heads and context with a small width and vocabulary: two training steps
in fp32 on one thread, with activations kept and recomputed, each in a process of its own. Memory is what the process
held at most beyond what it held before the first step. Exit code 1: a loss or a gradient differs in any bit, or
recomputing did not lower the peak.
"""

import sys
import time
from typing import Any

from benchmarks import result

RECIPES = ("helium-13m", "helium-nano-45m", "slm-tinystories", "smollm-135m", "smolm135", "flow-1b", "flow-qwen")
HEAD_WIDTH, VOCABULARY, ROWS, STEPS = 16, 1024, 2, 2


def main() -> int:
    """Measure every recipe both ways, print the table, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("--recipes", nargs="*", default=RECIPES, metavar="NAME", help="files of configs/ (all)")
    parser.add_argument("--repeats", type=int, default=3, help="processes a side; sides take turns")
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.recipes:
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for _ in range(arguments.repeats):
            for recompute in runs:
                runs[recompute].append(result.isolated(measure, recipe=recipe, recompute=recompute))
        rows.append(summarised(recipe, *runs.values()))
        print(result.table(rows[-1:]) + "\n", flush=True)
    result.write("gradient_checkpointing", rows, arguments.json)
    return 0 if all(row["holds"] for row in rows) else 1


def summarised(recipe: str, kept: list[dict[str, Any]], recomputed: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one recipe's two sides."""

    def middle(runs: list[dict[str, Any]], key: str) -> float:
        return result.median([run[key] for run in runs])

    shape = result.recipe_model(recipe)
    equal = all(run[key] == kept[0][key] for run in kept + recomputed for key in ("losses", "gradients"))
    memory = middle(recomputed, "memory") / middle(kept, "memory")
    return {
        "recipe": recipe,
        "layers": shape.n_layers,
        "context": shape.context,
        "kept_mib": middle(kept, "memory") / 2**20,
        "recomputed_mib": middle(recomputed, "memory") / 2**20,
        "memory": memory,
        "spread": max(result.spread([run["memory"] for run in runs]) for runs in (kept, recomputed)),
        "time": middle(recomputed, "seconds") / middle(kept, "seconds"),
        "bits": "equal" if equal else "differ",
        "holds": equal and memory < 1,
    }


def measure(recipe: str, recompute: bool) -> dict[str, Any]:
    """Losses and a hash of all gradients of the last step, CPU-seconds a step, and the memory the steps took."""
    import hashlib

    import torch

    from data.loader import Batch
    from machine import process
    from machine.hardware import memory_in_use
    from models import build_model
    from training.objectives import NextToken
    from training.optimizer import MuonAdamW

    process.return_memory()  # as the trainer does for models whose activations count
    shape = result.recipe_model(recipe)
    width = HEAD_WIDTH * shape.n_heads
    config = result.recipe_model(recipe, vocab_size=VOCABULARY, d_model=width, head_dim=HEAD_WIDTH, d_ff=2 * width,
                                 gradient_checkpointing=recompute)  # fmt: skip
    objective = NextToken(build_model(config)).train()
    optimizer = MuonAdamW(objective.model.named_parameters())
    torch.manual_seed(0)
    rows = torch.randint(VOCABULARY, (ROWS, config.context + 1))
    documents = (torch.arange(config.context) * 3 // config.context).expand(ROWS, -1)
    seeds = torch.arange(ROWS)
    batch = Batch(rows[:, :-1], rows[:, 1:], documents, seeds, seeds)
    before, began = memory_in_use(), time.process_time()
    losses = []
    for step in range(STEPS):
        loss, tokens, _ = objective(batch)
        (loss / tokens).backward()
        losses.append(float(loss.detach() / tokens).hex())
        if step < STEPS - 1:
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.process_time() - began) / STEPS
    digest = hashlib.sha256()
    for parameter in objective.parameters():
        digest.update(parameter.grad.numpy().tobytes())
    memory = result.peak_memory() - before
    return {"losses": losses, "gradients": digest.hexdigest(), "seconds": seconds, "memory": memory}


if __name__ == "__main__":
    sys.exit(main())
