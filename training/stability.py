"""Numbers that go wrong: batches that were skipped, losses that leap, and when to give up.

A batch whose loss or gradient is no number changes no weight: the optimizer looks at the gradient's norm, which is the
same on every rank, and where it stands, on the device. The host reads what the steps gave a little later, many at a
time, so that it never waits for a GPU in the middle of a step. What has to outlive the process is in RunState.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from checkpoints import RunState
from training.step_result import StepResult

if TYPE_CHECKING:
    from training.parallel import Strategy

MOST_UNREAD = 50  # steps
MEMORY = 0.98  # weight of the past in the running mean of the loss: some 50 steps
LEAP = 6.0  # standard deviations above the running mean that count as a spike
FEWEST = 25  # steps before there is a mean to speak of
LEAST_DEVIATION = 0.01  # nats


class Diverged(RuntimeError):
    """Training cannot go on: one batch after the other was skipped. The message says what to look at."""

    def __init__(self, state: RunState, step: int, phase: str, limit: int):
        before = "no loss was a number" if state.loss_count == 0 else f"before that it was about {state.loss_mean:.3f}"
        super().__init__(
            f"the last {limit} batches (up to step {step}, phase {phase}) had a loss or gradient that is no "
            f"number, and were skipped; {before}. The weights are as they were before these batches, and the last "
            "checkpoint stands. Usual causes: a learning rate too high for this model (lower optimizer.muon_lr and "
            "optimizer.adamw_lr, or warm up longer), no gradient clipping (optimizer.clip), or data that is broken "
            "from there on (the skipped samples stand in metrics.jsonl, event `skipped`)"
        )


@dataclasses.dataclass(frozen=True)
class SeenStep:
    """What the host found out about one step; `event` is "skipped", "loss_spike" or nothing."""

    step: int
    samples: range  # of the phase
    loss: float  # nats a token, over the global batch
    grad_norm: float
    event: str | None = None
    sigmas: float | None = None

    def details(self) -> dict[str, Any]:
        """For the record of the event. `at` is its step; the record's own step is when it was noticed."""
        found = {"at": self.step, "loss": self.loss, "grad_norm": self.grad_norm}
        found["samples"] = [self.samples.start, self.samples.stop]
        return {**found, "sigmas": self.sigmas} if self.sigmas is not None else found


class StepLog:
    """Steps whose numbers nobody has looked at yet."""

    def __init__(self, strategy: "Strategy"):
        self._strategy = strategy
        self._steps: list[tuple[int, range, StepResult]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def is_long(self) -> bool:
        """Whether it is time to read."""
        return len(self._steps) >= MOST_UNREAD

    def append(self, step: int, samples: range, result: StepResult) -> None:
        """Take note of a step, without waiting for its numbers."""
        self._steps.append((step, samples, result))

    def read(self, state: RunState) -> Iterator[SeenStep]:
        """Each unread step, in order, counted into `state`. Called by all ranks."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        losses = torch.stack([result.loss_sum for _, _, result in steps]).tolist()
        norms = torch.stack([result.grad_norm for _, _, result in steps]).tolist()
        totals = self._strategy.sum(*losses)
        for (step, samples, result), total, norm in zip(steps, totals, norms, strict=True):
            loss = total / max(result.tokens, 1)
            seen = SeenStep(step, samples, loss, norm)
            if not math.isfinite(norm):
                state.skipped += 1
                state.skipped_in_a_row += 1
                yield dataclasses.replace(seen, event="skipped")
                continue
            state.skipped_in_a_row = 0
            sigmas = _leap(state, loss)
            yield dataclasses.replace(seen, event="loss_spike", sigmas=sigmas) if sigmas > LEAP else seen


def _leap(state: RunState, loss: float) -> float:
    """Standard deviations that `loss` lies above the running mean, which then takes it in; 0 while there is none."""
    if state.loss_count == 0:
        state.loss_count, state.loss_mean, state.loss_variance = 1, loss, 0.0
        return 0.0
    deviation = max(state.loss_variance**0.5, LEAST_DEVIATION)
    sigmas = (loss - state.loss_mean) / deviation if state.loss_count >= FEWEST else 0.0
    gain = max(1 - MEMORY, 1 / (state.loss_count + 1))
    change = min(loss - state.loss_mean, LEAP * deviation)  # a spike must not widen what the next one is judged by
    state.loss_mean += gain * change
    state.loss_variance = (1 - gain) * (state.loss_variance + gain * change**2)
    state.loss_count += 1
    return sigmas
