"""Reading the weights of a stock Hugging Face folder into our models: Llama (SmolLM2), Mistral, Qwen3 and GPT-2.

Only where their mathematics is ours to the last term. What a config asks for beyond that (rope scaling, other
activations, biases in odd places) is refused by name, because a model that is nearly right answers nearly right.
Weights are read from safetensors alone.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import tensors
from checkpoints.checkpoint import CheckpointError
from models.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LLAMA_NAMES = (  # pattern of their name, ours
    (r"model\.embed_tokens\.", "embedding."),
    (r"model\.norm\.", "final_norm."),
    (r"lm_head\.", "head."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"blocks.\1.attention_norm."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"blocks.\1.feed_forward_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.", r"blocks.\1.attention.query."),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.", r"blocks.\1.attention.key."),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.", r"blocks.\1.attention.value."),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.", r"blocks.\1.attention.output."),
    (r"model\.layers\.(\d+)\.self_attn\.q_norm\.", r"blocks.\1.attention.query_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.k_norm\.", r"blocks.\1.attention.key_norm."),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj\.", r"blocks.\1.feed_forward.gate."),
    (r"model\.layers\.(\d+)\.mlp\.up_proj\.", r"blocks.\1.feed_forward.up."),
    (r"model\.layers\.(\d+)\.mlp\.down_proj\.", r"blocks.\1.feed_forward.down."),
)
_GPT2_NAMES = (
    (r"wte\.", "embedding."),
    (r"wpe\.", "position_embedding."),
    (r"ln_f\.", "final_norm."),
    (r"lm_head\.", "head."),
    (r"h\.(\d+)\.ln_1\.", r"blocks.\1.attention_norm."),
    (r"h\.(\d+)\.ln_2\.", r"blocks.\1.feed_forward_norm."),
    (r"h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attention.output."),
    (r"h\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.feed_forward.up."),
    (r"h\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.feed_forward.down."),
)
_GPT2_QKV = re.compile(r"h\.(\d+)\.attn\.c_attn\.(weight|bias)")
_NO_WEIGHTS = re.compile(r".*\.(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias)")  # buffers that old folders store

logger = logging.getLogger(__name__)


def is_folder(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face model's folder and not like one of our checkpoints."""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / "manifest.json").exists()


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
    kind = asked.given["model_type"]
    asked.only("hidden_act", "silu", "swish")
    asked.only("attention_bias", False)
    asked.only("mlp_bias", False)
    base = _rope_base(asked)
    window = None
    if kind == "mistral":  # null is no window, a missing key is what Mistral 7B has
        window = asked.optional("sliding_window") if "sliding_window" in asked.given else 4096
    if kind == "qwen3":
        asked.only("use_sliding_window", False)
    n_heads = asked.number("num_attention_heads")
    return ModelConfig(
        vocab_size=asked.number("vocab_size"),
        context=asked.number("max_position_embeddings"),
        n_layers=asked.number("num_hidden_layers"),
        d_model=asked.number("hidden_size"),
        n_heads=n_heads,
        n_kv_heads=asked.number("num_key_value_heads", n_heads),
        head_dim=asked.optional("head_dim"),
        d_ff=asked.number("intermediate_size"),
        norm_eps=asked.number("rms_norm_eps", 1e-6, float),
        qk_norm=kind == "qwen3",
        tied_head=bool(asked.given.get("tie_word_embeddings", False)),
        window=window,
        global_every=None,
        **({"rope_base": base} if window else {"rope_base_global": base}),
    )


def _rope_base(asked: _Asked) -> float:
    """Of plain rotary positions, wherever this version of `transformers` keeps it."""
    base = asked.number("rope_theta", 10_000.0, float)
    for key in ("rope_scaling", "rope_parameters"):  # the latter since transformers 5, with the base inside
        rope = asked.given.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{asked.path}: {key} is {rope!r}: use an object")
        kind = rope.get("rope_type", rope.get("type", "default"))  # the latter until transformers 4.43
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


def _llama_weights(stored: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {_renamed(name, _LLAMA_NAMES): tensor for name, tensor in stored.items()}


def _gpt2_weights(stored: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """GPT-2 keeps query, key and value in one matrix, and its matrices the other way round."""
    weights = {}
    for name, tensor in stored.items():
        name = name.removeprefix("transformer.")  # which the bare model's folder leaves out
        matrix = tensor.T if ".c_" in name and tensor.ndim == 2 else tensor
        if match := _GPT2_QKV.fullmatch(name):
            for part, piece in zip(("query", "key", "value"), matrix.chunk(3), strict=True):
                weights[f"blocks.{match[1]}.attention.{part}.{match[2]}"] = piece.contiguous()
        else:
            weights[_renamed(name, _GPT2_NAMES)] = matrix.contiguous()
    return weights


_Shape, _Weights = Callable[[_Asked], ModelConfig], Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]
_READERS: dict[str, tuple[_Shape, _Weights]] = {
    "llama": (_llama_shape, _llama_weights),
    "mistral": (_llama_shape, _llama_weights),
    "qwen3": (_llama_shape, _llama_weights),
    "gpt2": (_gpt2_shape, _gpt2_weights),
}


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in names:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name, count=1)
    return name  # which no parameter of ours has: told with the others


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
