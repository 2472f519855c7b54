"""A model as a GGUF file: for llama.cpp, and the apps that are made of it, some of which run any GGUF on an iPhone.

The architecture, its keys and what is changed about the weights come from export/stock.py. Matrices are in f16, f32 or
q8_0 (blocks of 32 with a scale each), vectors and learned positions always in f32. The tokenizer goes along: llama.cpp
splits text by its own copy of each known pattern, so that only tokenizers whose pattern it knows can be written.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.huggingface import renamed
from export import ExportFault, MissingPackage, Options, stock, stock_check
from export.huggingface import version_of
from export.trained import Trained
from models.config import ModelConfig
from tokenizer.bpe import CONFIG_FILE, SPLIT, TOKENIZER_FILE

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from torch import Tensor

OPTIONS = {"quantize": ("none", "q8_0"), "dtype": ("float32", "float16")}
FILE = "model.gguf"
NAMES = (  # theirs, ours; {} is the layer's number
    ("token_embd.", "embedding."),
    ("position_embd.", "position_embedding."),
    ("output_norm.", "final_norm."),
    ("output.", "head."),
    ("blk.{}.attn_norm.", "blocks.{}.attention_norm."),
    ("blk.{}.attn_q.", "blocks.{}.attention.query."),
    ("blk.{}.attn_k.", "blocks.{}.attention.key."),
    ("blk.{}.attn_v.", "blocks.{}.attention.value."),
    ("blk.{}.attn_output.", "blocks.{}.attention.output."),
    ("blk.{}.attn_q_norm.", "blocks.{}.attention.query_norm."),
    ("blk.{}.attn_k_norm.", "blocks.{}.attention.key_norm."),
    ("blk.{}.ffn_norm.", "blocks.{}.feed_forward_norm."),
    ("blk.{}.ffn_gate.", "blocks.{}.feed_forward.gate."),
    ("blk.{}.ffn_up.", "blocks.{}.feed_forward.up."),
    ("blk.{}.ffn_down.", "blocks.{}.feed_forward.down."),
)
JOINED = "blk.{}.attn_qkv."  # of GPT-2: query, key and value in one
PARTS = ("query", "key", "value")
TYPES = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}
BLOCK = 32  # of q8_0: a row has to be a multiple of it
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
NOT_VERIFIED = ("what llama.cpp computes with the file, and the token ids of its own tokenizer",)
tell = stock_check.tell


def problems(trained: Trained, options: Options) -> list[str]:
    """That llama.cpp has no architecture for the model, or no name for the way its tokenizer splits text.

    Raises:
        MissingPackage: gguf is not installed.
    """
    if version_of("gguf") is None:
        raise MissingPackage("the package gguf is not installed: pip install -r requirements.txt")
    found = []
    if stock.home(stock.LLAMA_CPP, trained.config) is None:
        found.append(f"{trained.path}: {stock.refusal(stock.LLAMA_CPP, trained.config)}")
    if options.quantize == "q8_0" and options.dtype is not None:
        found.append(f"--dtype {options.dtype} with --quantize q8_0: give one of them")
    if _pre(trained.tokenizer.definition) is None:
        found.append(f"{trained.path}: llama.cpp has no name for the way in which its tokenizer splits text: use one "
                     "of ours, Qwen's, SmolLM's or GPT-2's")  # fmt: skip
    return found


def room(trained: Trained, options: Options) -> int:
    """Bytes on the disk."""
    a_weight = 34 / 32 if options.quantize == "q8_0" else {"float32": 4, "float16": 2}[options.dtype or "float16"]
    head = trained.config.vocab_size * trained.config.d_model
    return int(1.02 * a_weight * (trained.config.parameters()["total"] + head)) + 20_000_000


def write(trained: Trained, options: Options, folder: Path) -> dict[str, Any]:
    """model.gguf into `folder`, where the tokenizer is already; returns the report.

    Raises:
        ExportFault: what was written does not compute what the checkpoint does.
    """
    dtype = "q8_0" if options.quantize == "q8_0" else options.dtype or "float16"
    row = stock.home(stock.LLAMA_CPP, trained.config)
    config, weights = stock.settled(row, trained.config, trained.model.state_dict())
    write_file(folder / FILE, trained, row, config, weights, TYPES[dtype], folder)
    held, whole = read_weights(folder / FILE, row, config)
    if held.keys() != weights.keys():
        raise ExportFault(f"{FILE} has other weights than were written: {sorted(held.keys() ^ weights.keys())[:5]}")
    return {
        "home": stock_check.about(row, trained.config),
        "dtype": dtype,
        "kept_in_f16": whole if dtype == "q8_0" else [],
        "weight_bytes": (folder / FILE).stat().st_size,
        "checked_with": None,
        "parity": stock_check.check(trained, config, held, None, dtype),
        "not_verified": list(NOT_VERIFIED),
    }


def write_file(
    path: Path, trained: Trained, row: stock.Home, config: ModelConfig, weights: Mapping[str, "Tensor"], kind: str,
    tokenizer: Path,
) -> None:  # fmt: skip
    """The GGUF file at `path`: weights by our names, which the architecture `row` can have, with the tokenizer in the
    folder `tokenizer`."""
    import gguf

    writer = gguf.GGUFWriter(path, row.name)
    writer.add_name(trained.name)
    types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
             "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}  # fmt: skip
    writer.add_file_type(types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in row.keys(config).items():
        _add(writer, f"{row.name}.{key}", value)
    for key, value in vocabulary(trained, tokenizer, config.vocab_size).items():
        _add(writer, f"tokenizer.{key}", value)
    for name, tensor in _stored(row, config, weights):
        data = tensor.detach().float().contiguous().numpy()
        kept = tensor.ndim == 1 or name.startswith("position_embd")
        stored = "f32" if kept else "f16" if kind == "q8_0" and tensor.shape[-1] % BLOCK else kind
        as_type = gguf.GGMLQuantizationType[stored.upper()]
        writer.add_tensor(name, gguf.quants.quantize(data, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_weights(path: Path, row: stock.Home, config: ModelConfig) -> tuple[dict[str, "Tensor"], list[str]]:
    """(weights by our names in fp32, names of matrices in f16) of the file at `path`: what `write_file` undoes."""
    import gguf
    import torch

    found, halves = {}, []
    for tensor in gguf.GGUFReader(path).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        halves += [tensor.name] if tensor.tensor_type == gguf.GGMLQuantizationType.F16 else []
        weight = weight.reshape(tuple(int(size) for size in reversed(tensor.shape)))
        layer = next((part for part in tensor.name.split(".") if part.isdigit()), "")
        if tensor.name.startswith(JOINED.format(layer)):
            kind = tensor.name.rsplit(".", 1)[1]
            for part, piece in zip(PARTS, weight.chunk(3), strict=True):
                found[f"blocks.{layer}.attention.{part}.{kind}"] = piece
        else:
            name = renamed(tensor.name, NAMES)
            found[name] = _turned(row, config, name, weight, back=True)
    return found, halves


def vocabulary(trained: Trained, folder: Path, rows: int) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in `folder`, without "tokenizer." in front of each key.

    Args:
        rows: of the embedding; those behind the tokenizer's last entry get names that no text spells.
    """
    definition = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    model = definition["model"]
    names = {number: name for name, number in model["vocab"].items()}
    added = {token["id"]: token for token in definition["added_tokens"]}
    names |= {number: token["content"] for number, token in added.items()}
    kinds = {number: CONTROL if token["special"] else USER_DEFINED for number, token in added.items()}
    missing = [number for number in range(rows) if number not in names]
    names |= {number: f"[PAD{number}]" for number in missing}
    kinds |= dict.fromkeys(missing, UNUSED)
    known = {
        "ggml.model": "gpt2",
        "ggml.pre": _pre(definition),
        "ggml.tokens": [names[number] for number in range(rows)],
        "ggml.token_type": [kinds.get(number, NORMAL) for number in range(rows)],
        "ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "ggml.eos_token_id": trained.tokenizer.end_of_text,
        "ggml.add_bos_token": bool(trained.begin),
    }
    if trained.begin:
        known["ggml.bos_token_id"] = trained.begin[0]
    if trained.chats:
        known["ggml.eot_token_id"] = trained.end
    pad = trained.tokenizer.named_tokens(["pad_token"]).get("pad_token")
    if pad is not None:
        known["ggml.padding_token_id"] = trained.tokenizer.token_id(pad)
    if isinstance(config.get("chat_template"), str):
        known["chat_template"] = config["chat_template"]
    return known


def _pre(definition: Mapping[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a tokenizer.json splits text; None if it has no name for it, or text is
    changed before that."""
    normalizer = (definition.get("normalizer") or {}).get("type")
    if definition["model"].get("type") != "BPE" or normalizer not in (None, "NFC"):
        return None
    found = definition.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    whole = last.get("use_regex", True)
    if not before and whole:
        return "gpt-2"
    if [step.get("type") for step in before] == ["Digits"] and before[0].get("individual_digits") and whole:
        return "smollm"
    split = [step.get("pattern", {}).get("Regex") for step in before if step.get("behavior") == "Isolated"]
    return "qwen2" if split == [SPLIT] and len(before) == 1 and not whole else None


def _stored(row: stock.Home, config: ModelConfig, weights: Mapping[str, "Tensor"]) -> list[tuple[str, "Tensor"]]:
    """(name, tensor) as the architecture has them."""
    import torch

    found = []
    for name, tensor in weights.items():
        *place, part, kind = name.split(".")
        if row.name == "gpt2" and part in PARTS:
            if part == PARTS[0]:
                joined = torch.cat([weights[".".join([*place, one, kind])] for one in PARTS])
                found.append((JOINED.format(place[1]) + kind, joined))
            continue
        found.append((renamed(name, NAMES, back=True), _turned(row, config, name, tensor)))
    return found


def _turned(row: stock.Home, config: ModelConfig, name: str, tensor: "Tensor", back: bool = False) -> "Tensor":
    """Rows of queries and keys in the order in which rotary positions turn neighbours, where the architecture does."""
    heads = {"query": config.n_heads, "key": config.n_kv_heads}.get(name.split(".")[-2])
    if not row.turns_neighbours or heads is None:
        return tensor
    halves = (config.d_head // 2, 2) if back else (2, config.d_head // 2)
    return tensor.unflatten(0, (heads, *halves)).transpose(1, 2).flatten(0, 2)


def _add(writer: "GGUFWriter", key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}  # fmt: skip
    kinds[type(value)](key, value)


def logits(path: Path, ids: list[int], chunks: Sequence[int] | None = None) -> "np.ndarray":
    """[T, V] in fp32, as llama.cpp computes them with the file at `path`, caches in f32 (llama-cpp-python).

    Args:
        chunks: how many ids it is given at a time; None: all at once.
    """
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 8, n_batch=len(ids), logits_all=True, n_gpu_layers=0, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    start = 0
    for length in chunks or [len(ids)]:
        model.eval(ids[start : start + length])
        start += length
    return np.array(model.scores[: len(ids)], dtype=np.float32)
