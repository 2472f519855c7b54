"""Does a recipe's training step fit this machine, and is its plan right? python -m benchmarks.one_step --json FILE

Builds the recipe on the meta device, prints what `--dry-run` says of it, then makes the weights, takes one real
training step of one sample (fp32, or bf16 autocast) and states the process's peak memory beside the plan's.
"""

import sys
import time
from typing import Any

from benchmarks import result
from machine.process import usable_cores


def main() -> int:
    """Plan, step, compare, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("--recipe", default="flow-1b", help="a file of configs/ (flow-1b)")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    shape = dict(recipe=arguments.recipe, context=arguments.context, precision=arguments.precision)
    row = {**shape, **planned(**shape), **result.isolated(measure, threads=usable_cores(), **shape)}
    row["measured_of_planned"] = row["peak_memory"] / row["planned_memory"]
    print(result.table([{key: value for key, value in row.items() if not isinstance(value, dict)}]))
    result.write("one_step", [row], arguments.json)
    return 0


def _configured(recipe: str, context: int, precision: str) -> Any:
    from settings import read, validate
    from training.settings import RunConfig

    overrides = [f"parallel.precision={precision}", "parallel.device=cpu", "phases.*.micro_batch=1"]
    config = validate(RunConfig, read(result.ROOT / "configs" / f"{recipe}.yaml", overrides))
    phase = next(phase for phase in config.phases if phase.context == context)
    return config, phase.model_copy(update={"batch_tokens": context, "tokens": context})


def planned(recipe: str, context: int, precision: str) -> dict[str, Any]:
    """The plan's parameters and memory for one sample a step, from the model's shape alone."""
    from models import build_model
    from training.budget import memory_bytes

    config, phase = _configured(recipe, context, precision)
    model = build_model(result.recipe_model(recipe), device="meta")
    memory = memory_bytes(model.config, config, phase)
    print("plan, GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "planned_memory": sum(memory.values()), "plan": memory}


def measure(recipe: str, context: int, precision: str) -> dict[str, Any]:
    """One step of Muon and AdamW on one random sample: losses, and seconds by part."""
    import torch

    from data.loader import Batch
    from machine import process
    from models import build_model
    from training.objectives import NextToken
    from training.optimizer import MuonAdamW

    process.return_memory()  # as the trainer does for a model of this size
    times, began = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        times[name], began = round(time.perf_counter() - began, 1), time.perf_counter()

    objective = NextToken(build_model(result.recipe_model(recipe))).train()
    settings = _configured(recipe, context, precision)[0].optimizer
    optimizer = MuonAdamW(objective.model.named_parameters(), muon_lr=settings.muon_lr, adamw_lr=settings.adamw_lr,
                          newton_schulz_dtype=torch.bfloat16 if precision == "bf16" else torch.float32)  # fmt: skip
    optimizer.set_learning_rate(0.05)  # one step of the whole rate is no fair test of a warmed-up schedule
    torch.manual_seed(0)
    rows = torch.randint(objective.model.config.vocab_size, (1, context + 1))
    one = torch.arange(1)
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros_like(rows[:, 1:]), one, one)
    lap("build_seconds")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, tokens, _ = objective(batch)
    before = float(loss / tokens)
    (loss / tokens).backward()
    lap("forward_backward_seconds")
    torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    lap("optimizer_seconds")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, tokens, _ = objective(batch)
    return {"loss_before": before, "loss_after": float(loss / tokens), **times}


if __name__ == "__main__":
    sys.exit(main())
