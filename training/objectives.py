"""What a training step computes: an objective is a module around the model, and its forward reads a batch.

The loss is computed inside `forward`, because the objective is what DDP, and later FSDP2 and DeepSpeed, wrap: they see
one call in, one call out. It returns sums, not means; the trainer divides by the global count of trained tokens.
"""

from torch import Tensor, nn

from data.loader import Batch
from models.kernels.ignored import IGNORE
from models.kernels.losses import Lesson, linear_cross_entropy, linear_distillation


class NextToken(nn.Module):
    """Cross-entropy of each next token; in a phase that distills, of tokens with a teacher's scores also the divergence
    from its probabilities. In evaluation mode the loss is the cross-entropy, whatever there is.

    One for all phases of a run, so that it is wrapped once: what differs between them is an attribute.

    Attributes:
        alpha: weight of the cross-entropy where there are scores; the divergence has the rest.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.alpha = 1.0

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of losses in nats, fp32; number of trained tokens; further metrics as sums: where there are scores, the
        `divergence` in nats and over how many `scored` tokens)."""
        hidden = self.model.hidden_states(batch.input_ids, batch.document_ids, batch.dropout_seeds).flatten(0, 1)
        head, labels, trained = self.model.head_weight, batch.labels.flatten(), (batch.labels != IGNORE).sum()
        if batch.teacher_ids is None:
            return linear_cross_entropy(hidden, head, labels), trained, {}
        lesson = Lesson(batch.teacher_ids.flatten(0, 1), batch.teacher_logprobs.flatten(0, 1), self.alpha)
        sums = linear_distillation(hidden, head, labels, lesson)
        told = {"divergence": sums.divergence, "scored": sums.scored}
        return sums.loss if self.training else sums.cross_entropy, trained, told
