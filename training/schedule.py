"""The learning rate as a pure function of progress: no scheduler object, nothing to step, nothing to restore.

Every shape starts with a linear warm-up and gives a multiplier of the optimizer's peak learning rates.
"""

import math
from typing import Literal

import pydantic

from settings import Problem, Section

Shape = Literal["cosine", "cosine_restarts", "wsd", "linear", "constant"]


class ScheduleSection(Section):
    """The learning rate over one phase."""

    shape: Shape = "cosine"
    peak: float = pydantic.Field(1.0, gt=0)  # multiplies the optimizer's learning rates in this phase
    warmup: float = pydantic.Field(0.02, ge=0, lt=1)  # share of the phase
    final: float = pydantic.Field(0.1, ge=0, le=1)  # multiplier at the end, as a share of the peak
    decay: float = pydantic.Field(0.2, gt=0, le=1)  # wsd: share of the phase, at its end, in which it falls
    cycles: int = pydantic.Field(1, ge=1)  # cosine_restarts: how many equal cycles

    def problems(self) -> list[Problem]:
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            remedy = f"use at most {1 - self.warmup:g}: warmup takes the rest of the phase"
            return [Problem("decay", self.decay, remedy)]
        return []


def multiplier(schedule: ScheduleSection, progress: float) -> float:
    """The learning rate's multiplier at `progress` (0 at the phase's start, 1 at its end).

    cosine (Loshchilov & Hutter 2017), cosine_restarts (SGDR, the same paper, equal cycles), wsd (warm-up, stable,
    linear decay; Hu et al. 2024), linear, constant.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < schedule.warmup:
        return schedule.peak * progress / schedule.warmup
    after = (progress - schedule.warmup) / (1 - schedule.warmup)
    if schedule.shape == "cosine_restarts":
        share = _cosine(after * schedule.cycles % 1.0 if after < 1 else 1.0)
    elif schedule.shape == "cosine":
        share = _cosine(after)
    elif schedule.shape == "linear":
        share = 1 - after
    elif schedule.shape == "wsd":
        share = min(1.0, (1 - progress) / schedule.decay)
    else:
        return schedule.peak
    return schedule.peak * (schedule.final + (1 - schedule.final) * share)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
