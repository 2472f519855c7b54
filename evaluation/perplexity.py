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
        objective: as in training; `forward(batch)` gives (loss sum, tokens, metrics).
        tokens_per_byte: of the text, end-of-text tokens counted.
        total: sums numbers over all ranks.
    """
    was_training = objective.training
    objective.eval()
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    with autocast:
        for batch in batches:
            loss_sum, trained, _ = objective(batch.to(device))
            loss += loss_sum.cpu().double()
            tokens += int(trained)
    objective.train(was_training)
    all_loss, all_tokens = total(float(loss), tokens)
    mean = all_loss / max(all_tokens, 1)
    return HeldOutLoss(mean, mean / math.log(2) * tokens_per_byte, int(all_tokens))


def mixed(losses: dict[str, HeldOutLoss], shares: dict[str, float]) -> HeldOutLoss:
    """The loss over a mixture of sources, each weighted by its share of the samples."""
    whole = sum(shares[name] for name in losses)
    weights = {name: shares[name] / whole for name in losses}
    return HeldOutLoss(
        sum(losses[name].val_loss * weight for name, weight in weights.items()),
        sum(losses[name].bits_per_byte * weight for name, weight in weights.items()),
        sum(loss.tokens for loss in losses.values()),
    )
