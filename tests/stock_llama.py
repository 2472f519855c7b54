"""A folder as Llama and Mistral are published: a tokenizer that begins texts with "<s>" and takes the space from the
first word of a text, and a small model with random weights beside it."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors, trainers

TEXTS = ["Once upon a time there was a cat.", "One day at noon, the cat sat on a mat!", "What is 2+2? It is 4."] * 30
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def begins_with(token: str, number: int) -> processors.TemplateProcessing:
    """The post-processor that puts a token before a text."""
    special = [(token, number)]
    return processors.TemplateProcessing(f"{token}:0 $A:0", f"{token}:0 $A:0 {token}:1 $B:1", special)


BEGINS = begins_with("<s>", 1)


def save_tokenizer(
    path: Path, post_processor: processors.PostProcessor | None = BEGINS, **config: object
) -> None:
    """Write tokenizer.json and tokenizer_config.json, of ids <unk> 0, <s> 1 and </s> 2 among others."""
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [chr(code) for code in range(33, 127)]
    special = ["<unk>", "<s>", "</s>", "<extra>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(TEXTS, trainer)
    if post_processor is not None:
        engine.post_processor = post_processor
    path.mkdir(parents=True, exist_ok=True)
    engine.save(str(path / "tokenizer.json"))
    about = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE,
             "tokenizer_class": "PreTrainedTokenizerFast", **config}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(about))


def save_model(path: Path) -> None:
    """Write a small Llama with random weights, of a size at which its choices are sharp."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(path)
