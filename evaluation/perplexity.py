"""Loss on held-out text: nats a token, perplexity as its exponential, bits a byte beside it.

Bits a byte do not depend on the tokenizer, so they compare runs that perplexity cannot.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from data.loader import Batch


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over held-out text."""

    val_loss: float  # nats a token
    bits_per_byte: float
    tokens: int
    divergence: float | None = None  # from a teacher, nats a token that has its scores

    @property
    def perplexity(self) -> float:
        """exp(nats a token)."""
        return math.exp(self.val_loss) if self.val_loss < 700 else math.inf


@torch.no_grad()
def held_out_loss(
    objective: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens_per_byte: float,
    device: torch.device,
    autocast: contextlib.AbstractContextManager,
    total: Callable[..., list[float]],
) -> HeldOutLoss:
    """The loss of `objective` over `batches`, all ranks together.

    Args:
        objective: as in training; `forward(batch)` gives (loss sum, tokens, metrics as sums: where the batch has a
            teacher's scores, the `divergence` from it, and over how many `scored` tokens).
        tokens_per_byte: of the text, end-of-text tokens counted.
        total: sums numbers over all ranks.
    """
    was_training = objective.training
    objective.eval()
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    divergence, scored = torch.zeros((), dtype=torch.float64), 0
    with autocast:
        for batch in batches:
            loss_sum, trained, metrics = objective(batch.to(device))
            loss += loss_sum.cpu().double()
            tokens += int(trained)
            if "divergence" in metrics:
                divergence += metrics["divergence"].cpu().double()
                scored += int(metrics["scored"])
    objective.train(was_training)
    all_loss, all_tokens, all_divergence, all_scored = total(float(loss), tokens, float(divergence), scored)
    mean = all_loss / max(all_tokens, 1)
    from_teacher = all_divergence / all_scored if all_scored else None
    return HeldOutLoss(mean, mean / math.log(2) * tokens_per_byte, int(all_tokens), from_teacher)


def mixed(losses: dict[str, HeldOutLoss], shares: dict[str, float]) -> HeldOutLoss:
    """The loss over a mixture of sources, each weighted by its share of the samples."""
    whole = sum(shares[name] for name in losses)
    weights = {name: shares[name] / whole for name in losses}
    return HeldOutLoss(
        sum(losses[name].val_loss * weight for name, weight in weights.items()),
        sum(losses[name].bits_per_byte * weight for name, weight in weights.items()),
        sum(loss.tokens for loss in losses.values()),
    )
