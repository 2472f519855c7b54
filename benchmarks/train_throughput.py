"""How fast, and in how much memory, does one core train, beside Hugging Face's Llama of the same shape?

python -m benchmarks.train_throughput --recipe helium-13m --batch 4 16 --precision fp32 bf16 --json FILE

Tokens per CPU-second of whole steps (forward, backward, clipping, optimizer) on one thread and one repeated random
batch. Each measurement has a process of its own; sides take turns, and medians count. Both sides use AdamW; our
default, Muon for matrices, stands beside it. Theirs is the loop that transformers' users write: labels into the model,
`torch.optim.AdamW`. Its attention sees everything, ours the recipe's windows; `full` is ours without windows. Our
scripts prepare their process (machine/process.py); theirs is measured as its users run it, and prepared like ours.
"""

import sys
import time
from typing import Any

from benchmarks import result

WARMUP = 2
SIDES = ("ours", "ours, full attention", "ours, Muon", "transformers", "transformers, prepared")


def main() -> int:
    """Measure every side, print the ratios, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("--recipe", default="helium-13m", help="a file of configs/ (helium-13m)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="samples a step")
    parser.add_argument("--context", type=int, help="tokens a sample (the recipe's)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of one process")
    parser.add_argument("--repeats", type=int, default=3, help="processes a side")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    arguments = parser.parse_args()
    context = arguments.context or result.recipe_model(arguments.recipe).context
    rows = []
    for precision in arguments.precision:
        for batch in arguments.batch:
            shape = dict(recipe=arguments.recipe, batch=batch, context=context, steps=arguments.steps)
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(arguments.repeats):
                for side in SIDES:
                    found = result.isolated(measure, side != "transformers", side=side, precision=precision, **shape)
                    runs[side].append(found)
            rows += summarised(precision, batch, runs)
            print(result.table(rows[-len(SIDES) :]) + "\n", flush=True)
    result.write("train_throughput", rows, arguments.json, recipe=arguments.recipe, context=context)
    return 0


def summarised(precision: str, batch: int, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a side: medians, and what they are of the other side's."""

    def middle(side: str, key: str) -> float:
        return result.median([run[key] for run in runs[side]])

    return [
        {
            "precision": precision,
            "batch": batch,
            "side": side,
            "tokens_per_cpu_second": middle(side, "rate"),
            "spread": result.spread([run["rate"] for run in runs[side]]),
            "times_transformers": middle(side, "rate") / middle("transformers", "rate"),
            "peak_memory": middle(side, "peak_memory"),
            "of_transformers_memory": middle(side, "peak_memory") / middle("transformers", "peak_memory"),
            "first_loss": middle(side, "first_loss"),
            "last_loss": middle(side, "last_loss"),
        }
        for side in SIDES
    ]


def measure(side: str, recipe: str, batch: int, context: int, steps: int, precision: str) -> dict[str, Any]:
    """Train `steps` steps after a warm-up; tokens per CPU-second, first and last loss."""
    import torch

    torch.manual_seed(0)
    config = result.recipe_model(recipe, context=context)
    rows = torch.randint(config.vocab_size, (batch, context + 1))
    step = _Theirs(config, rows) if side.startswith("transformers") else _Ours(config, rows, side)
    losses, began = [], 0.0
    for number in range(WARMUP + steps):
        if number == WARMUP:
            began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = step.forward()
        step.update(loss)
        losses.append(loss.item())
    rate = steps * batch * context / (time.process_time() - began)
    return {"rate": rate, "first_loss": losses[0], "last_loss": losses[-1]}


class _Ours:
    """Our objective and optimizer, as the trainer uses them."""

    def __init__(self, config: Any, rows: Any, side: str):
        import dataclasses

        import torch

        from data.loader import Batch
        from machine import process
        from models import build_model
        from training.objectives import NextToken
        from training.optimizer import MuonAdamW

        process.return_memory()  # as the trainer does for a model of this size
        if side == "ours, full attention":
            config = dataclasses.replace(config, window=None)
        self.objective = NextToken(build_model(config)).train()
        named = self.objective.model.named_parameters()
        self.optimizer = MuonAdamW(named, muon_lr=0.02 if side == "ours, Muon" else None, adamw_lr=3e-4)
        documents = torch.zeros_like(rows[:, 1:])
        seeds = torch.arange(len(rows))
        self.batch = Batch(rows[:, :-1], rows[:, 1:], documents, seeds, seeds)

    def forward(self):
        loss, tokens, _ = self.objective(self.batch)
        return loss / tokens

    def update(self, loss) -> None:
        import torch

        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Theirs:
    """transformers' Llama in a plain loop."""

    def __init__(self, config: Any, rows: Any):
        import torch

        self.model = result.stock_llama(config, use_cache=False).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95))
        self.rows = rows[:, :-1].contiguous()

    def forward(self):
        return self.model(input_ids=self.rows, labels=self.rows).loss

    def update(self, loss) -> None:
        import torch

        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
