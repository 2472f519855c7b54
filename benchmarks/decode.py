"""How fast, and in how much memory, does one core write? python -m benchmarks.decode --json FILE

One sequence, one thread: tokens/s at several lengths, with fp32, bf16 and int8 weights, beside `generate` of
transformers' Llama of the same shape (greedy, with its cache). Weights are random; speed does not depend on them. Each
measurement has a process of its own, whose peak memory counts whole, imports and all; sides take turns, and medians
count. transformers stops where its cost is plain: its attention sees everything, ours the recipe's windows. Our scripts
prepare their process (machine/process.py: huge pages); theirs is measured as its users run it, and prepared like ours.
"""

import sys
import time
from typing import Any

from benchmarks import result

PROMPT = 16
OURS = ("fp32", "bf16", "int8")
SIDES = (*OURS, "transformers", "transformers, prepared")


def main() -> int:
    """Measure every side and length, print the ratios, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("--recipe", default="helium-13m", help="a file of configs/ (helium-13m)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[200, 1000, 4000])
    parser.add_argument("--most-theirs", type=int, default=1000, help="longest text asked of transformers")
    parser.add_argument("--repeats", type=int, default=5, help="processes a side and length")
    arguments = parser.parse_args()
    rows = []
    first: dict[str, float] = {}
    for tokens in arguments.tokens:
        sides = [side for side in SIDES if side in OURS or tokens <= arguments.most_theirs]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side in sides:
                prepared = side != "transformers"
                found = result.isolated(measure, prepared, side=side, recipe=arguments.recipe, tokens=tokens)
                runs[side].append(found)
        for side in sides:
            rates = [run["tokens_per_second"] for run in runs[side]]
            rate = result.median(rates)
            first.setdefault(side, rate)
            theirs = runs.get("transformers")
            base = result.median([run["tokens_per_second"] for run in theirs]) if theirs else None
            rows.append(
                {
                    "tokens": tokens,
                    "side": side,
                    "tokens_per_second": rate,
                    "spread": result.spread(rates),
                    "times_transformers": rate / base if base else None,
                    "of_own_speed_at_first_length": rate / first[side],
                    "peak_mib": result.median([run["peak_memory"] for run in runs[side]]) / 2**20,
                }
            )
        print(result.table(rows[-len(sides) :]) + "\n", flush=True)
    result.write("decode", rows, arguments.json, recipe=arguments.recipe)
    return 0


def measure(side: str, recipe: str, tokens: int) -> dict[str, Any]:
    """Tokens/s of `tokens` new ones after a short prompt."""
    config = result.recipe_model(recipe, context=PROMPT + tokens + 1)
    prompt = [(7 * k) % config.vocab_size for k in range(PROMPT)]
    write = _ours(config, side) if side in OURS else _theirs(config)
    write(prompt, 8)
    began = time.perf_counter()
    written = write(prompt, tokens)
    seconds = time.perf_counter() - began
    assert written == tokens, (written, tokens)
    return {"tokens_per_second": tokens / seconds}


def _ours(config: Any, weights: str) -> Any:
    from models import build_model
    from models.inference.decoding import generate
    from models.inference.ready import for_decoding
    from models.inference.sampling import Sampling

    model = for_decoding(build_model(config).eval(), weights)
    return lambda prompt, new: len(generate(model, [prompt], new, sampling=Sampling(temperature=0))[0])


def _theirs(config: Any) -> Any:
    import torch

    model = result.stock_llama(config).eval()
    model.generation_config.pad_token_id = 0

    def write(prompt: list[int], new: int) -> int:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                 do_sample=False, use_cache=True)  # fmt: skip
        return out.shape[1] - len(prompt)

    return write


if __name__ == "__main__":
    sys.exit(main())
