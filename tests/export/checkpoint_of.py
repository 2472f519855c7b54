"""A small checkpoint on disk, for tests that export one."""

from checkpoints import RunState, checkpoint
from models import ModelConfig
from tests.small_models import build_awake
from tokenizer import Tokenizer

SHAPE = ModelConfig(
    vocab_size=1024, context=48, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, window=8, global_every=2
)
TEXT = "Once upon a time there was a little girl. 12 + 30 = 42; One Two three four, said the cat and the dog. " * 40


def save_checkpoint(root, chats=False, text=TEXT):
    """The run's folder; with `chats`, its training documents held the marks of conversations."""
    tokenizer = Tokenizer.train([text], 1024)
    names = ("<|user|>", "<|assistant|>", "<|end|>") if chats else ()
    held = [tokenizer.end_of_text, *(tokenizer.token_id(name) for name in names)]
    checkpoint.save(
        root / "checkpoints", RunState(seed=1, step=3, special_tokens=held), model=build_awake(SHAPE).state_dict(),
        optimizer={}, model_config=SHAPE, run_config={}, tokenizer=tokenizer,
    )  # fmt: skip
    return root
