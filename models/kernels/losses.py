"""Losses straight from hidden states, a chunk of tokens at a time, so that all logits never exist at once:
cross-entropy, and the divergence from a teacher's probabilities.

With V = 32,000 the fp32 logits of 16,384 tokens would be 2 GB. Here a chunk's logits are made, used for the loss and,
in the same pass, for the gradients, and dropped; the backward pass only scales what is already there.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.ignored import IGNORE, UNSCORED
from models.kernels.limits import LOGITS_AT_ONCE

_LEAST_REST = 1e-30  # sum of exp(logit - largest) below which there is nothing beside the teacher's entries


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of cross-entropies (nats, fp32 scalar) of logits = hidden @ weight.T against `labels`.

    Args:
        hidden: [N, d]; weight: [V, d]; labels: [N] int64, `IGNORE` where nothing is learned.
        chunk: tokens whose logits exist together; None: as many as suit the device.

    Matrix products run in the autocast dtype when autocast is on, the softmax always in fp32.
    """
    return _LinearLoss.apply(hidden, weight, labels, None, *_manner(hidden, weight, chunk))[0]


class Lesson(NamedTuple):
    """What a teacher says of N positions."""

    ids: Tensor  # [N, k] integers, k different entries; UNSCORED throughout where it says nothing
    logprobs: Tensor  # [N, k] their log-probabilities (natural, temperature 1), of any floating type
    alpha: float  # weight of the cross-entropy where it says something; the divergence has the rest


class DistillationLoss(NamedTuple):
    """Sums over positions with a label, fp32 scalars."""

    loss: Tensor  # what is learned from; the others only tell, and have no gradient
    cross_entropy: Tensor
    divergence: Tensor  # over those of them with scores
    scored: Tensor  # how many these are, int64


def linear_distillation(
    hidden: Tensor, weight: Tensor, labels: Tensor, lesson: Lesson, chunk: int | None = None
) -> DistillationLoss:
    """Sums over positions of alpha * cross-entropy + (1 - alpha) * KL(teacher || student) where the teacher says
    something, and of cross-entropy alone where it does not (Hinton et al. 2015, at temperature 1).

    The divergence is over k + 1 outcomes: the teacher's k entries, and everything else together, whose share is what
    the k leave of 1 (`_Outcomes`). With k = V that is the whole divergence. Arguments are as in
    `linear_cross_entropy`, and so are the types in which is computed.
    """
    return DistillationLoss(*_LinearLoss.apply(hidden, weight, labels, lesson, *_manner(hidden, weight, chunk)))


def _manner(hidden: Tensor, weight: Tensor, chunk: int | None) -> tuple[int, torch.dtype]:
    """(tokens whose logits exist together, type of the matrix products)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if chunk is None:
        chunk = max(64, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cpu"]) // len(weight))
    return chunk, dtype


class _Outcomes:
    """The teacher's k entries and the rest of the vocabulary, of some positions; beside the student's.

    Stored probabilities are rounded, so that the k may have a little more than 1 between them: they are divided by
    their sum. Where the student has no rest (k = V, or it is that sure of the k), neither has the teacher.
    """

    def __init__(self, lesson: Lesson, part: slice, logits: Tensor, largest: Tensor):
        """
        Args:
            logits: [n, V] fp32; largest: [n, 1], the largest of each.
        """
        ids = lesson.ids[part].to(torch.int64)
        self.scored = ids[:, :1] != UNSCORED  # [n, 1]
        self.ids = ids.where(self.scored, torch.arange(ids.shape[1], device=ids.device))  # different ones, of no weight
        self.weight = (1 - lesson.alpha) * self.scored  # [n, 1], of the divergence
        self.cross_entropy_weight = 1 - self.weight[:, 0]
        self._teacher = lesson.logprobs[part].float().clamp(min=torch.finfo(torch.float16).min)  # finite
        self._student = logits.gather(1, self.ids) - largest  # less the logarithm of the sum

    def divergence(self, exps: Tensor, total: Tensor) -> Tensor:
        """KL [n] in nats, 0 where nothing is scored. `exps` [n, V], exp(logit - largest) with sum `total` [n, 1],
        become what the gradient by the logits is `total` times, for the weights of both losses but for the target."""
        top = exps.gather(1, self.ids)
        rest = exps.scatter_(1, self.ids, 0).sum(dim=-1, keepdim=True)
        has_rest = rest > _LEAST_REST
        rest = rest.clamp(min=_LEAST_REST)
        shares = self._teacher.exp()
        tail = (1 - shares.sum(dim=-1, keepdim=True)).clamp(min=0) * has_rest
        whole = shares.sum(dim=-1, keepdim=True) + tail
        shares, tail = shares / whole, tail / whole
        of_top = shares * (self._teacher - whole.log() - self._student + total.log())
        of_rest = torch.xlogy(tail, tail) - tail * (rest.log() - total.log())
        # By a logit: q - p among the k, q * (1 - p_rest / q_rest) beside them.
        exps.mul_(1 - self.weight * tail * total / rest)
        exps.scatter_(1, self.ids, top - self.weight * shares * total)
        return (of_top.sum(dim=-1) + of_rest[:, 0]) * self.scored[:, 0]


class _LinearLoss(torch.autograd.Function):
    """The sums of `DistillationLoss`; without a lesson, the first is the cross-entropy, and the others are 0."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, lesson: Lesson | None, chunk: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        loss, cross_entropy, divergence = (hidden.new_zeros((), dtype=torch.float32) for _ in range(3))
        scored = labels.new_zeros(())
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
                outcomes = None if lesson is None else _Outcomes(lesson, part, logits, largest)
                exps = logits.sub_(largest).exp_()  # in the logits' own memory
                total = exps.sum(dim=-1, keepdim=True)
                surprise = (largest + total.log() - target_logit)[:, 0]
                to_target = -total
                if outcomes is None:
                    loss += (surprise * trained).sum()
                else:
                    distance = outcomes.divergence(exps, total)
                    weighted = outcomes.cross_entropy_weight * surprise + outcomes.weight[:, 0] * distance
                    loss += (weighted * trained).sum()
                    cross_entropy += (surprise * trained).sum()
                    divergence += (distance * trained).sum()
                    scored += (outcomes.scored[:, 0] & trained).sum()
                    to_target = -total * outcomes.cross_entropy_weight[:, None]
                if not (needs_hidden or needs_weight):
                    continue
                # The gradient by the logits is exps / total, less 1 at the target. Dividing is done to narrow matrices,
                # not to [chunk, V].
                exps = exps.scatter_add_(1, safe_target, to_target).to(dtype)
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
        ctx.mark_non_differentiable(cross_entropy, divergence, scored)
        return loss, cross_entropy, divergence, scored

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_of_what_only_tells: None):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype) if grad_hidden is not None else None,
            grad_weight * grad_loss if grad_weight is not None else None,
            None,
            None,
            None,
            None,
        )
