"""Text to token ids and back: byte-level BPE, its training (`python -m tokenizer.train`) and the chat format.

`Tokenizer` is all that other rooms need; `tokenizer.settings.TokenizerSection` is its part of the config.
Importing this package loads nothing heavy: the class arrives on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.bpe import Tokenizer, TokenizerError

__all__ = ["Tokenizer", "TokenizerError"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tokenizer import bpe

        return getattr(bpe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
