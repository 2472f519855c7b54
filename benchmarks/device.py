"""What measurements on one device share: they take turns on its memory, and one that fails leaves the others theirs.

Nothing but torch is needed, nor imported before it is.
"""

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch

Row = dict[str, Any]


@contextlib.contextmanager
def not_alone(rows: list[Row], about: Row, skipped: list[str]) -> Iterator[None]:
    """Around one of several measurements, so that the others are made whatever becomes of it: one that does not fit the
    card is skipped, one that fails is a row that does not hold, with the reason."""
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    try:
        yield
    except torch.OutOfMemoryError:
        skipped.append(f"{told}: does not fit this card")
    except Exception as error:  # noqa: BLE001  whatever a kernel or its compiler raises
        traceback.print_exc()
        rows.append({**about, "error": f"{type(error).__name__}: {str(error).strip()[:300]}", "holds": False})
    free()


def free() -> None:
    """Let go of the last model, and of its compilations, which would count against the next one's."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until `device` has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
