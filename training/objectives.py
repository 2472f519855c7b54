"""What a training step computes: an objective is a module around the model, and its forward reads a batch.

The loss is computed inside `forward`, because the objective is what DDP, and later FSDP2 and DeepSpeed, wrap: they see
one call in, one call out. It returns sums, not means; the trainer divides by the global count of trained tokens.
"""

from torch import Tensor, nn

from data.loader import Batch
from models.losses import IGNORE, linear_cross_entropy


class NextToken(nn.Module):
    """Cross-entropy of each next token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of losses in nats, fp32; number of trained tokens; further metrics as sums)."""
        hidden = self.model.hidden_states(batch.input_ids, batch.document_ids, batch.dropout_seeds)
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.model.head_weight, batch.labels.flatten())
        return loss, (batch.labels != IGNORE).sum(), {}
