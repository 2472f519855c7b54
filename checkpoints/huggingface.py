"""Reading the weights of a stock Hugging Face folder into our models: Llama (SmolLM2), Mistral, Ministral, Qwen3,
GraniteSWA, Mellum and GPT-2; and the names that those classes give to our weights, for whoever writes such a folder.

Only where their mathematics is ours to the last term. What a config asks for beyond that (rope scaling, other
activations, biases in odd places) is refused by name, because a model that is nearly right answers nearly right.
Weights are read from safetensors alone.
"""

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import tensors
from checkpoints.checkpoint import MODEL_CONFIG, CheckpointError
from models.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXPORTED = "slms_"  # begins the model_type of our exports that are no stock folders
SLIDING, FULL = "sliding_attention", "full_attention"  # in layer_types
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Their names and ours; {} is the layer's number. Read forwards here, backwards by `stock_weights`.
_LLAMA_NAMES = (
    ("model.embed_tokens.", "embedding."),
    ("model.norm.", "final_norm."),
    ("lm_head.", "head."),
    ("model.layers.{}.input_layernorm.", "blocks.{}.attention_norm."),
    ("model.layers.{}.post_attention_layernorm.", "blocks.{}.feed_forward_norm."),
    ("model.layers.{}.self_attn.q_proj.", "blocks.{}.attention.query."),
    ("model.layers.{}.self_attn.k_proj.", "blocks.{}.attention.key."),
    ("model.layers.{}.self_attn.v_proj.", "blocks.{}.attention.value."),
    ("model.layers.{}.self_attn.o_proj.", "blocks.{}.attention.output."),
    ("model.layers.{}.self_attn.q_norm.", "blocks.{}.attention.query_norm."),
    ("model.layers.{}.self_attn.k_norm.", "blocks.{}.attention.key_norm."),
    ("model.layers.{}.mlp.gate_proj.", "blocks.{}.feed_forward.gate."),
    ("model.layers.{}.mlp.up_proj.", "blocks.{}.feed_forward.up."),
    ("model.layers.{}.mlp.down_proj.", "blocks.{}.feed_forward.down."),
)
_GPT2_NAMES = (
    ("wte.", "embedding."),
    ("wpe.", "position_embedding."),
    ("ln_f.", "final_norm."),
    ("lm_head.", "head."),
    ("h.{}.ln_1.", "blocks.{}.attention_norm."),
    ("h.{}.ln_2.", "blocks.{}.feed_forward_norm."),
    ("h.{}.attn.c_proj.", "blocks.{}.attention.output."),
    ("h.{}.mlp.c_fc.", "blocks.{}.feed_forward.up."),
    ("h.{}.mlp.c_proj.", "blocks.{}.feed_forward.down."),
)
_GPT2_QKV = re.compile(r"h\.(\d+)\.attn\.c_attn\.(weight|bias)")
_GPT2_PARTS = ("query", "key", "value")  # of which GPT-2 makes one matrix
_GPT2_OURS = re.compile(r"blocks\.(\d+)\.attention\.(query|key|value)\.(weight|bias)")
_SINKS, _NO_SINK = "model.layers.{}.self_attn.sinks", -1e4  # of GraniteSWA; e to that power is nothing beside any key
_NO_WEIGHTS = re.compile(r".*\.(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias)")  # buffers that old folders store

logger = logging.getLogger(__name__)


def is_folder(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face model's folder and not like one of our checkpoints."""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / MODEL_CONFIG).exists()


def read_shape(path: str | Path) -> ModelConfig:
    """The shape of the model in the folder `path`.

    Raises:
        CheckpointError: it is no such folder, another architecture, or asks for something that our model does not do.
    """
    return _shape_and_kind(Path(path))[0]


def _shape_and_kind(path: Path) -> tuple[ModelConfig, str]:
    try:
        given = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = given["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / CONFIG} is no Hugging Face model config ({error!r})") from error
    if isinstance(kind, str) and kind.startswith(EXPORTED):
        raise CheckpointError(f"{path} was made for another program by convert.py, which cannot be read back: use the "
                              "checkpoint that it was made of")  # fmt: skip
    if not isinstance(kind, str) or kind not in _READERS:
        raise CheckpointError(f"{path / CONFIG}: model_type is {kind!r}; use one of {', '.join(_READERS)}")
    asked = _Asked(path / CONFIG, given)
    asked.only("quantization_config", None)
    config = _READERS[kind][0](asked)
    if problems := config.problems():
        told = "; ".join(f"{key} {value!r}: {remedy}" for key, value, remedy in problems)
        raise CheckpointError(f"{path / CONFIG}: {told}")
    return config, kind


def read(
    path: str | Path, device: str = "cpu", dtype: "torch.dtype | None" = None
) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """The shape and the weights, by our names, of the model in the folder `path`: each goes to `device` and is made
    `dtype` (None: fp32) as it is read, but norms are fp32.

    Raises:
        CheckpointError: it is no such folder, another architecture, or asks for something that our model does not do.
    """
    path = Path(path)
    config, kind = _shape_and_kind(path)
    rename = _READERS[kind][1]
    weights = rename(_stored(path, tensors.placing(device, dtype)))
    if config.tied_head:
        head = weights.pop("head.weight", None)
        if head is not None and not head.equal(weights.get("embedding.weight", head)):
            raise CheckpointError(f"{path}: tie_word_embeddings is true in its {CONFIG}, and its lm_head.weight is not "
                                  "its embedding: set it to false, or remove that weight")  # fmt: skip
    _check_names_and_shapes(path, config, weights)
    return config, weights


class _Asked:
    """A config.json of which every key that matters is either taken or must have the one value we support."""

    def __init__(self, path: Path, given: Mapping[str, Any]):
        self.path, self.given = path, given

    def number(self, key: str, default: float | None = None, kind: type = int) -> Any:
        """The number at `key`, or `default` where it is missing or null. Raises CheckpointError for anything else."""
        value = self.optional(key, kind)
        if value is None and default is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return default if value is None else value

    def optional(self, key: str, kind: type = int) -> Any:
        """The number at `key`, None where it is missing or null. Raises CheckpointError for anything else."""
        value = self.given.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, kind))):
            raise CheckpointError(f"{self.path}: {key} is {value!r}: use a {'whole ' if kind is int else ''}number")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuse any value but these; the first is what a missing key means."""
        value = self.given.get(key, supported[0])
        if value not in supported:
            choices = " or ".join(repr(choice) for choice in supported)
            raise CheckpointError(f"{self.path}: {key} is {value!r}, of which our model knows only {choices}")


def _llama_shape(asked: _Asked) -> ModelConfig:
    """Of Llama and the classes that add to it: windows, some layers with them, normalised queries and keys."""
    kind = asked.given["model_type"]
    asked.only("hidden_act", "silu", "swish")
    asked.only("attention_bias", False)
    asked.only("mlp_bias", False)
    n_heads, d_model = asked.number("num_attention_heads"), asked.number("hidden_size")
    head_dim = asked.number("head_dim", 128) if kind == "mellum" else asked.optional("head_dim")
    if kind == "mellum" and {*(asked.given.get("mlp_layer_types") or ["sparse"])} != {"dense"}:
        raise CheckpointError(f"{asked.path}: mlp_layer_types is {asked.given.get('mlp_layer_types')!r}, of which our "
                              "model knows only 'dense'")  # fmt: skip
    if kind == "granite_swa":
        for key in ("residual_multiplier", "logits_scaling"):
            asked.only(key, 1.0)
        scale = (head_dim or d_model // n_heads) ** -0.5
        if not math.isclose(asked.number("attention_multiplier", 1.0, float), scale, rel_tol=1e-6):
            raise CheckpointError(f"{asked.path}: attention_multiplier is {asked.given.get('attention_multiplier')!r}, "
                                  f"of which our model knows only head_dim^-0.5 ({scale!r})")  # fmt: skip
    return ModelConfig(
        vocab_size=asked.number("vocab_size"),
        context=asked.number("max_position_embeddings"),
        n_layers=asked.number("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=asked.number("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=asked.number("intermediate_size"),
        norm_eps=asked.number("rms_norm_eps", 1e-5 if kind == "granite_swa" else 1e-6, float),
        qk_norm=kind in ("qwen3", "mellum"),
        tied_head=bool(asked.given.get("tie_word_embeddings", kind == "granite_swa")),
        embedding_scale=asked.number("embedding_multiplier", 1.0, float) if kind == "granite_swa" else 1.0,
        **_windows_and_bases(asked, kind),
    )


def _windows_and_bases(asked: _Asked, kind: str) -> dict[str, Any]:
    """`window`, `global_every`, `rope_base` and `rope_base_global`, as far as there are layers of their kind."""
    n_layers = asked.number("num_hidden_layers")
    window, types = _window(asked, kind), asked.given.get("layer_types")
    if types is None:
        types = [FULL if kind == "mellum" or not window else SLIDING] * n_layers
        if kind == "granite_swa":
            types = [FULL if layer % 4 == 0 else SLIDING for layer in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers or not set(types) <= {FULL, SLIDING}:
        raise CheckpointError(f"{asked.path}: layer_types is {types!r}: use {FULL} or {SLIDING} for each of the "
                              f"{n_layers} layers")  # fmt: skip
    if kind == "mistral":  # which knows no layer_types
        types = [SLIDING if window else FULL] * n_layers
    if SLIDING in types and (window is None or kind == "llama"):
        raise CheckpointError(f"{asked.path}: layer_types has {SLIDING}, of which a {kind} without windows knows "
                              "nothing")  # fmt: skip
    every = types.index(FULL) + 1 if {*types} == {FULL, SLIDING} else None
    found: dict[str, Any] = {"window": window if SLIDING in types else None, "global_every": every}
    if every and types != [SLIDING if (layer + 1) % every else FULL for layer in range(n_layers)]:
        raise CheckpointError(f"{asked.path}: layer_types has {FULL} at no regular distance: ours have it at every "
                              "N-th layer and no other")  # fmt: skip
    names = {SLIDING: "rope_base", FULL: "rope_base_global"}
    for layer_type, base in zip(types, _bases(asked, kind, types), strict=True):
        if found.setdefault(names[layer_type], base) != base:
            raise CheckpointError(f"{asked.path}: layers of the type {layer_type} have the rotary bases "
                                  f"{found[names[layer_type]]} and {base}: ours have one for each type")  # fmt: skip
    return found


def _window(asked: _Asked, kind: str) -> int | None:
    """The window of the layers that have one. Null is none, a missing key what the class takes then."""
    missing = {"mistral": 4096, "ministral": 4096, "qwen3": 4096, "granite_swa": 128, "mellum": 1024}
    if kind == "llama" or (kind == "qwen3" and not asked.given.get("use_sliding_window", False)):
        return None
    if kind == "qwen3" and not asked.given.get("layer_types"):
        asked.only("use_sliding_window", False)
    return asked.optional("sliding_window") if "sliding_window" in asked.given else missing[kind]


def _bases(asked: _Asked, kind: str, types: list[str]) -> list[float]:
    """The rotary base of each layer."""
    if kind == "mellum":
        ropes = asked.given.get("rope_parameters") or {FULL: {"rope_theta": 500_000.0}, SLIDING: {}}
        if not isinstance(ropes, dict) or not all(isinstance(ropes.get(name), dict) for name in types):
            raise CheckpointError(f"{asked.path}: rope_parameters is {ropes!r}: use an object for each of layer_types")
        bases = {name: _rope_base(_Asked(asked.path, {"rope_parameters": ropes[name]})) for name in {*types}}
        return [bases[name] for name in types]
    base, each = _rope_base(asked), asked.given.get("layer_rope_theta") if kind == "granite_swa" else None
    if each is None:
        return [base] * len(types)
    numbers = isinstance(each, list) and all(isinstance(one, (int, float)) and one > 0 for one in each)
    if not numbers or len(each) != len(types):
        raise CheckpointError(f"{asked.path}: layer_rope_theta is {each!r}: use a number above 0 for each of the "
                              f"{len(types)} layers")  # fmt: skip
    return [float(one) for one in each]


def _rope_base(asked: _Asked) -> float:
    """Of plain rotary positions, wherever this version of `transformers` keeps it."""
    base = asked.number("rope_theta", 10_000.0, float)
    for key in ("rope_scaling", "rope_parameters"):  # the latter since transformers 5, with the base inside
        rope = asked.given.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{asked.path}: {key} is {rope!r}: use an object")
        kind = rope.get("rope_type", rope.get("type", "default"))  # the latter until transformers 4.43
        _Asked(asked.path, rope).only("partial_rotary_factor", 1.0, None)
        if kind != "default":
            raise CheckpointError(f"{asked.path}: {key} asks for {kind!r}, ours is only 'default'")
        base = _Asked(asked.path, rope).number("rope_theta", base, float)
    return base


def _gpt2_shape(asked: _Asked) -> ModelConfig:
    asked.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    asked.only("scale_attn_weights", True)
    asked.only("scale_attn_by_inverse_layer_idx", False)
    asked.only("add_cross_attention", False)
    d_model, n_heads = asked.number("n_embd"), asked.number("n_head")
    return ModelConfig(
        vocab_size=asked.number("vocab_size"),
        context=asked.number("n_positions"),
        n_layers=asked.number("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_ff=asked.optional("n_inner") or 4 * d_model,
        feed_forward="gelu",
        norm="layer",
        norm_eps=asked.number("layer_norm_epsilon", 1e-5, float),
        positions="learned",
        bias=True,
        tied_head=bool(asked.given.get("tie_word_embeddings", True)),
        window=None,
        global_every=None,
    )


def end_ids(path: str | Path) -> list[int]:
    """The tokens that end a text of the model in the folder `path`, as generation_config.json names them, or else its
    config.json; none if neither does.

    Raises:
        CheckpointError: one of them cannot be read, or names something else.
    """
    for file in (Path(path) / GENERATION_CONFIG, Path(path) / CONFIG):
        if not file.exists():
            continue
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): it should hold a JSON object") from error
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise CheckpointError(f"{file}: eos_token_id is {named!r}: use a token's id, or a list of them")
        if ids:
            return ids
    return []


def suppressed_ids(path: str | Path) -> list[int]:
    """The tokens that generation_config.json of the folder `path` says are never drawn; none where it says nothing, or
    nothing that can be read."""
    try:
        named = json.loads((Path(path) / GENERATION_CONFIG).read_text(encoding="utf-8")).get("suppress_tokens")
    except (OSError, ValueError, AttributeError):
        return []
    return [token for token in named if isinstance(token, int)] if isinstance(named, list) else []


def stock_weights(kind: str, config: ModelConfig, weights: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Our weights by the names and in the form in which the class of model_type `kind` has them: what `read` undoes."""
    return _READERS[kind][2](weights, config)


def _llama_weights(stored: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {renamed(name, _LLAMA_NAMES): tensor for name, tensor in stored.items()}


def _to_llama(weights: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
    return {renamed(name, _LLAMA_NAMES, back=True): tensor for name, tensor in weights.items()}


def _granite_swa_weights(stored: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Without the sinks, which every layer has there and none of ours: they have to be nothing.

    Raises:
        CheckpointError: one takes part of the attention.
    """
    sinks = re.compile(re.escape(_SINKS).replace(r"\{\}", r"\d+"))
    for name, tensor in stored.items():
        if sinks.fullmatch(name) and float(tensor.max()) > _NO_SINK:
            raise CheckpointError(f"{name} reaches {float(tensor.max()):g}: our model has no attention sinks, which "
                                  f"are off at {_NO_SINK:g} and below")  # fmt: skip
    return _llama_weights({name: tensor for name, tensor in stored.items() if not sinks.fullmatch(name)})


def _to_granite_swa(weights: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
    import torch

    sinks = {_SINKS.format(layer): torch.full((config.n_heads,), _NO_SINK) for layer in range(config.n_layers)}
    return _to_llama(weights, config) | sinks


def _gpt2_weights(stored: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """GPT-2 keeps query, key and value in one matrix, and its matrices the other way round."""
    weights = {}
    for name, tensor in stored.items():
        name = name.removeprefix("transformer.")  # which the bare model's folder leaves out
        matrix = tensor.T if ".c_" in name and tensor.ndim == 2 else tensor
        if match := _GPT2_QKV.fullmatch(name):
            for part, piece in zip(_GPT2_PARTS, matrix.chunk(3), strict=True):
                weights[f"blocks.{match[1]}.attention.{part}.{match[2]}"] = piece.contiguous()
        else:
            weights[renamed(name, _GPT2_NAMES)] = matrix.contiguous()
    return weights


def _to_gpt2(weights: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
    import torch

    stored = {}
    for name, tensor in weights.items():
        if match := _GPT2_OURS.fullmatch(name):
            if match[2] != _GPT2_PARTS[0]:
                continue
            parts = [weights[f"blocks.{match[1]}.attention.{part}.{match[3]}"] for part in _GPT2_PARTS]
            theirs, tensor = f"h.{match[1]}.attn.c_attn.{match[3]}", torch.cat(parts)
        else:
            theirs = renamed(name, _GPT2_NAMES, back=True)
        matrix = tensor.T if ".c_" in theirs and tensor.ndim == 2 else tensor
        stored[theirs if theirs.startswith("lm_head.") else f"transformer.{theirs}"] = matrix.contiguous()
    return stored


_Shape = Callable[[_Asked], ModelConfig]
_Weights = Callable[[Mapping[str, "Tensor"]], dict[str, "Tensor"]]
_Back = Callable[[Mapping[str, "Tensor"], ModelConfig], dict[str, "Tensor"]]
_READERS: dict[str, tuple[_Shape, _Weights, _Back]] = {  # the shape, weights by our names, and by theirs again
    "llama": (_llama_shape, _llama_weights, _to_llama),
    "mistral": (_llama_shape, _llama_weights, _to_llama),
    "qwen3": (_llama_shape, _llama_weights, _to_llama),
    "gpt2": (_gpt2_shape, _gpt2_weights, _to_gpt2),
    "ministral": (_llama_shape, _llama_weights, _to_llama),
    "granite_swa": (_llama_shape, _granite_swa_weights, _to_granite_swa),
    "mellum": (_llama_shape, _llama_weights, _to_llama),
}


def renamed(name: str, names: tuple[tuple[str, str], ...], back: bool = False) -> str:
    """A weight's name by a table of (theirs, ours), "{}" for the layer's number; `back`: theirs of ours."""
    for pair in names:
        given, wanted = reversed(pair) if back else pair
        if match := re.match(re.escape(given).replace(r"\{\}", r"(\d+)"), name):
            return wanted.format(*match.groups()) + name[match.end() :]
    return name  # which no parameter of the model has: told with the others


def _stored(path: Path, place: Callable[[str, "Tensor"], "Tensor"]) -> dict[str, "Tensor"]:
    """Every weight of the folder's safetensors files, where `place` puts it."""
    import torch
    from safetensors import SafetensorError

    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    packed: list[str] = []

    def placed(name: str, tensor: "Tensor") -> "Tensor":
        if tensor.dtype in plain or _NO_WEIGHTS.fullmatch(name):
            return place(name, tensor)
        packed.append(f"{name} ({tensor.dtype})")
        return tensor

    stored: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            found = tensors.read(file, placed)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error})") from error
        if twice := sorted(stored.keys() & found.keys()):
            raise CheckpointError(f"{file} has weights that another file of its folder has too ({twice[0]}): remove "
                                  f"those that are not the model's, or name the right ones in a {INDEX}")  # fmt: skip
        stored |= found
    if packed:
        raise CheckpointError(f"{path}: quantised weights are not read: {', '.join(packed[:5])}; use a folder with "
                              "fp32, bf16 or fp16")  # fmt: skip
    return {name: tensor for name, tensor in stored.items() if not _NO_WEIGHTS.fullmatch(name)}


def weight_files(path: Path) -> list[Path]:
    """Where the weights of the model in the folder `path` are, as `transformers` chooses: in model.safetensors, else in
    the files of the index, else in all there are. Some folders hold them once more by other names, as
    consolidated.safetensors; an index beside model.safetensors is what a model saved before has left, and told so.

    Raises:
        CheckpointError: there are none, or the index is none.
    """
    whole, index = path / WEIGHTS, path / INDEX
    if whole.exists():
        if index.exists():
            _tell_of_stale(path)
        return [whole]
    if index.exists():
        return [path / name for name in _indexed(index)]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no *.safetensors: weights are loaded from safetensors files only")
    return files


@functools.cache
def _tell_of_stale(path: Path) -> None:
    """Warn, once, of the files beside model.safetensors that no one reads."""
    try:
        shards = [name for name in _indexed(path / INDEX) if name != WEIGHTS and (path / name).exists()]
    except CheckpointError:
        shards = []
    logger.warning("%s: its weights are read from %s, as transformers does; beside it, of another save and not read: "
                   "%s (remove what is not the model's)", path, WEIGHTS, ", ".join([INDEX, *shards]))  # fmt: skip


def _indexed(index: Path) -> list[str]:
    """The files that an index names. Raises CheckpointError where it is none."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({Path(name).name for name in names})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error!r})") from error


def _check_names_and_shapes(path: Path, config: ModelConfig, weights: dict[str, "Tensor"]) -> None:
    from models import build_model

    expected = {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        wrong = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
        told = {"missing": missing, "not ours": extra, "of another shape": sorted(wrong)}
        details = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in told.items() if names)
        raise CheckpointError(f"{path}: its weights do not fit its {CONFIG} ({details})")
