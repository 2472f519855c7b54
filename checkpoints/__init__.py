"""What a checkpoint holds, by canonical name, the same whichever backend saved it.

    from checkpoints import load_model
    model, tokenizer, config = load_model("runs/x")
"""

from checkpoints.checkpoint import CheckpointError, RunState, newest, resolve, take_stock
from checkpoints.loading import (
    load_model,
    locate,
    never_drawn,
    read_model,
    read_shape,
    stop_ids,
    text_start,
    tokenizer_of,
)  # fmt: skip

__all__ = [
    "CheckpointError", "RunState", "load_model", "locate", "never_drawn", "newest", "read_model", "read_shape",
    "resolve", "stop_ids", "take_stock", "text_start", "tokenizer_of",
]  # fmt: skip
