"""What a checkpoint holds, by canonical name, the same whichever backend saved it.

    from checkpoints import load_model
    model, tokenizer, config = load_model("runs/x")
"""

from checkpoints.checkpoint import CheckpointError, RunState, load_model, newest, resolve

__all__ = ["CheckpointError", "RunState", "load_model", "newest", "resolve"]
