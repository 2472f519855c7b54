"""What one optimizer step gave, as the trainer hands it to whoever watches."""

import dataclasses

import torch


@dataclasses.dataclass
class StepResult:
    """What one optimizer step gave; tensors stay on the device until somebody looks."""

    loss_sum: torch.Tensor  # over this rank's tokens, nats
    tokens: int  # trained, all ranks
    read: int  # positions that hold a document, all ranks: of conversations not all are trained
    learning_rate: float  # multiplier of the peaks
    grad_norm: torch.Tensor
