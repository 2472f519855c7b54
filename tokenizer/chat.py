"""The special tokens of our own tokenizers, and the chat format as the Jinja template that `transformers` applies.

A turn is `<|user|>content<|end|>`, with nothing between the role mark and the content: special tokens are hard
boundaries for BPE, so that a conversation encoded piece by piece has the same ids as the rendered string, and the
loss mask of chat tuning falls between tokens. The template uses only what the Jinja engines of `transformers`,
llama.cpp and swift-transformers share (hence no `{% generation %}`). Encoding the pieces is also the safe way: in a
rendered string, a role mark that a user typed cannot be told from a real one.
"""

from collections.abc import Collection
from typing import Any

END_OF_TEXT = "<|endoftext|>"  # between documents
PAD = "<|pad|>"  # not END_OF_TEXT: collators that ignore the loss on padding would then never teach a model to stop
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_OF_TURN = "<|end|>"
RESERVED = [f"<|reserved_{number}|>" for number in range(10)]  # for marks to come, without resizing a trained model

SPECIAL_TOKENS = [END_OF_TEXT, PAD, *ROLES.values(), END_OF_TURN, *RESERVED]  # ids 0 to 15, in this order

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('a role is system, user or assistant, not ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def default_config(special_tokens: Collection[str], end_of_text: str) -> dict[str, Any]:
    """`tokenizer_config.json` of a tokenizer that came without one.

    Args:
        special_tokens: the special tokens it has; with all of ours among them, it can chat in our format.
        end_of_text: the one that ends a document.
    """
    config: dict[str, Any] = {"eos_token": end_of_text}
    if PAD in special_tokens:
        config["pad_token"] = PAD
    if {*ROLES.values(), END_OF_TURN} <= set(special_tokens):
        config["chat_template"] = CHAT_TEMPLATE
    return config
