"""The models, in pure torch: this room imports nothing else of the project.

`build_model(ModelConfig(...))` gives a module with the same few methods for every architecture:
    model(input_ids [B,T] int64, document_ids [B,T] | None) -> logits [B,T,V]
    model.hidden_states(input_ids, document_ids) -> [B,T,d_model], for losses that never hold all logits
    model.new_state(batch) -> State;  model.step(input_ids [B,t], state) -> logits [B,t,V], for decoding
"""

from typing import TYPE_CHECKING

from models.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ModelConfig", "build_model"]


def build_model(config: ModelConfig, seed: int = 0, device: "torch.device | str" = "cpu") -> "nn.Module":
    """The model that `config` describes, its weights drawn from `seed` alone, whatever the device.

    On the "meta" device it has shapes and no memory: shard it, then `to_empty(device=...)` and `initialise(seed)`.

    Raises:
        ValueError: the config is impossible; the message lists every reason.
    """
    if problems := config.problems():
        raise ValueError("; ".join(f"{key}: {remedy} (it is {value!r})" for key, value, remedy in problems))
    import torch  # only when a model is built

    from models.transformer import Transformer

    with torch.device(device):
        model = Transformer(config)
    if torch.device(device).type != "meta":
        model.initialise(seed)
    return model
