"""Is what was written for another program the checkpoint's? For all formats that use a stock class.

Two questions, because their answers mean different things. Does the other program compute what our model does with the
very weights that were written, so that only a wrong class, key or name makes a difference? And how far are those
weights, which may be folded or rounded, from the checkpoint? Both over a text that reaches past every window.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from export import ExportFault
from export.parity import GRAPH, ROUNDING, Bounds, compare
from export.stock import Home, changes
from export.trained import Trained
from models.config import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

STILL_THE_MODEL = Bounds(mean_kl=0.05)  # whatever the weights were rounded to
Client = Callable[[list[int]], "np.ndarray"]  # ids -> logits [T, V]


def check(
    trained: Trained, config: ModelConfig, weights: Mapping[str, "Tensor"], client: Client | None, dtype: str
) -> dict[str, Any]:
    """How far apart the checkpoint, our model with what was written, and the other program are.

    Args:
        config, weights: what was written, read back by our names, in fp32.
        client: the other program; None where it is not installed.
        dtype: of what was written. In float32 nothing but the order of operations may differ, in float16 rounding that
            is more than usual is told, of others only their distance.

    Raises:
        ExportFault: they do not compute the same.
    """
    import torch

    from export import bundle
    from models import build_model

    ids = bundle.long_prompt(trained)
    model = build_model(config, device="meta")
    model.load_state_dict(weights, assign=True)
    model.compute_tables("cpu")
    with torch.inference_mode():
        expected = trained.model(torch.tensor([ids]))[0].numpy()
        held = model.eval()(torch.tensor([ids]))[0].numpy()
    written = compare(expected, held)
    found = {"positions": len(ids), "against_checkpoint": dataclasses.asdict(written)}
    if problems := written.problems(GRAPH if dtype == "float32" else STILL_THE_MODEL):
        raise ExportFault("what was written computes something else than the checkpoint: " + "; ".join(problems))
    found["rounding_out_of_bounds"] = written.problems(ROUNDING) if dtype == "float16" else []
    if client is not None:
        theirs = compare(held, client(ids))
        if problems := theirs.problems(GRAPH):
            raise ExportFault("the other program computes something else than the checkpoint: " + "; ".join(problems))
        found["graph"] = dataclasses.asdict(theirs)
    return found


def about(row: Home, config: ModelConfig) -> dict[str, Any]:
    """For export_report.json: the class, its least version, and what was changed for it."""
    return {"client": row.client, "class": row.name, "least": row.version(), "changes": changes(row, config)}


def tell(report: dict[str, Any], out: "Path") -> None:
    """Print what was made, how near it is, and what nobody has looked at."""
    home, parity = report["home"], report["parity"]
    print(f"{out}: {report['weight_bytes'] / 1e6:,.2f} MB of weights as {home['class']}, for {home['least']}")
    for change in home["changes"]:
        print(f"changed: {change}")
    for name, title in (("graph", report["checked_with"]), ("against_checkpoint", "against the checkpoint")):
        if name in parity:
            of = parity[name]
            print(f"{title:24} max abs {of['max_abs']:.2e} of a range of {of['range']:.1f}, mean KL "
                  f"{of['mean_kl']:.1e}, top-1 {of['top1']:.3f}")  # fmt: skip
    for problem in parity["rounding_out_of_bounds"]:
        print(f"rounding changes more than usual: {problem}")
    print(f"Not checked here: {'; '.join(report['not_verified'])}.")
