"""Does a windowed layer cost the same a token at any length? python -m benchmarks.attention_scaling --json FILE

The attention sub-layer alone (projections, rotation, attention, output), forward and backward, one sample, one thread,
fp32, at the head shapes of two recipes, and the same layer seeing everything beside it. Memory is what the process
held at most beyond what it held before. Exit code 1: a windowed layer's cost a token at the longest length is 1.15
times that at the shortest, or its memory has grown 1.15 times as fast as the length.

What a pass frees stays with the process for the next one. With --memory returned it goes back to the system, as it
does in training (machine/process.py), and every pass pays for it anew: that is the system's cost, not the layer's, and
it is larger for long passes on a virtual machine that hands back to its host what has been free for some seconds.
"""

import sys
import time
from typing import Any

from benchmarks import result

SHAPES = ("helium-13m", "flow-1b")
ALLOWED = 1.15
WARM_UP = 256  # tokens


def main() -> int:
    """Measure every shape and length, print the table, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5, help="processes a length; lengths take turns")
    parser.add_argument("--memory", choices=["kept", "returned"], default="kept", help="what a pass has freed")
    arguments = parser.parse_args()
    rows = []
    for recipe in SHAPES:
        for windowed in (True, False):
            runs: dict[int, list[dict[str, Any]]] = {length: [] for length in arguments.lengths}
            for _ in range(arguments.repeats if windowed else 1):
                for length in arguments.lengths:
                    found = result.isolated(
                        measure, recipe=recipe, length=length, windowed=windowed, memory=arguments.memory
                    )
                    runs[length].append(found)
            rows += summarised(recipe, windowed, runs)
            print(result.table(rows[-len(runs) :]) + "\n", flush=True)
    holds = all(row["holds"] for row in rows)
    result.write("attention_scaling", rows, arguments.json)
    return 0 if holds else 1


def summarised(recipe: str, windowed: bool, runs: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a length: medians, and their growth from the shortest length."""
    shortest = min(runs)

    def middle(length: int, key: str) -> float:
        return result.median([run[key] for run in runs[length]])

    rows = []
    for length in runs:
        cost = middle(length, "seconds_per_token") / middle(shortest, "seconds_per_token")
        memory = (middle(length, "memory") / middle(shortest, "memory")) / (length / shortest)
        rows.append(
            {
                "recipe": recipe,
                "layer": "windowed" if windowed else "full",
                "length": length,
                "microseconds_per_token": 1e6 * middle(length, "seconds_per_token"),
                "spread": result.spread([run["seconds_per_token"] for run in runs[length]]),
                "cost_growth": cost,
                "memory_mib": middle(length, "memory") / 2**20,
                "memory_growth_by_length": memory,
                "holds": not windowed or (cost <= ALLOWED and memory <= ALLOWED),
            }
        )
    return rows


def measure(recipe: str, length: int, windowed: bool, memory: str) -> dict[str, Any]:
    """CPU-seconds a token of one forward and backward pass, the median of several, and the memory they took."""
    import torch

    from machine import process
    from machine.hardware import memory_in_use
    from models.kernels.attention import Layout
    from models.transformer import Attention, RotaryTable

    if memory == "returned":
        process.return_memory()
    else:
        process.keep_memory()
    torch.manual_seed(0)
    config = result.recipe_model(recipe, context=length, **({} if windowed else {"window": None}))
    layer = Attention(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=config.d_model**-0.5)
    table = RotaryTable(length, config.d_head, 1e4)

    def one_pass(x: torch.Tensor, gradient: torch.Tensor) -> None:
        tokens = x.shape[1]
        rotation = table(torch.arange(tokens)[None])
        out = layer(x, rotation, Layout.of(None, tokens, x.device).mask(layer.window))
        out.backward(gradient)
        layer.zero_grad()
        x.grad = None

    for tokens in (WARM_UP, length):  # the first loads the kernels
        x, gradient = torch.randn(2, 1, tokens, config.d_model).unbind()
        x.requires_grad_()
        before, times = memory_in_use(), []
        for _ in range(2 + 8192 // tokens):
            began = time.process_time()
            one_pass(x, gradient)
            times.append((time.process_time() - began) / tokens)
    return {"seconds_per_token": result.median(times[1:]), "memory": result.peak_memory() - before}


if __name__ == "__main__":
    sys.exit(main())
