"""Cross-entropy straight from hidden states, a chunk of tokens at a time, so that all logits never exist at once.

With V = 32,000 the fp32 logits of 16,384 tokens would be 2 GB. Here a chunk's logits are made, used for the loss and,
in the same pass, for the gradients, and dropped; the backward pass only scales what is already there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import LOGITS_AT_ONCE

IGNORE = -100  # label of a position where nothing is learned


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of cross-entropies (nats, fp32 scalar) of logits = hidden @ weight.T against `labels`.

    Args:
        hidden: [N, d]; weight: [V, d]; labels: [N] int64, `IGNORE` where nothing is learned.
        chunk: tokens whose logits exist together; None: as many as suit the device.

    Matrix products run in the autocast dtype when autocast is on, the softmax always in fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if chunk is None:
        chunk = max(64, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cpu"]) // len(weight))
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(dtype)
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                cast_hidden, target = hidden[part].to(dtype), labels[part]
                trained = target != IGNORE
                safe_target = target.where(trained, 0)[:, None]
                logits = F.linear(cast_hidden, cast_weight).float()
                largest = logits.amax(dim=-1, keepdim=True)
                target_logit = logits.gather(1, safe_target)
                exps = logits.sub_(largest).exp_()  # in the logits' own memory
                total = exps.sum(dim=-1, keepdim=True)
                loss += ((largest + total.log() - target_logit)[:, 0] * trained).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # The gradient by the logits is exps / total, less 1 at the target. Dividing is done to narrow matrices,
                # not to [chunk, V].
                exps = exps.scatter_add_(1, safe_target, -total).to(dtype)
                share = trained[:, None] / total
                if needs_hidden:
                    grad_hidden[part] = (exps @ cast_weight).to(hidden.dtype).mul_(share)
                if needs_weight:
                    learning = (cast_hidden * share).to(dtype)
                    if dtype == grad_weight.dtype:
                        grad_weight.addmm_(exps.T, learning)
                    else:
                        grad_weight += exps.T @ learning
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype) if grad_hidden is not None else None,
            grad_weight * grad_loss if grad_weight is not None else None,
            None,
            None,
            None,
        )
