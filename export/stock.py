"""Where a model of ours is at home in other programs: one row a client and class, with the condition on its shape, the
class's own keys for it, what has to be changed about the weights, and the first version that has the class.

A row stands here only if the class computes what ours does to the last term; loading proves nothing, for a class that
drops the windows loads as well. Rows are tried in order, the simplest and oldest classes first. A model that has no
home is refused with the options of a recipe that would give it one.

Two exact changes of the weights make most of it work. A class that does not know `embedding_scale` s gets everything
that is added to the residual stream divided by s, and the norms' eps by s^2: pre-norm models compute the same with a
stream that is s times smaller. Attention sinks that cannot be left out are set so low that they take no part.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from checkpoints.huggingface import FULL, SLIDING
from models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

TRANSFORMERS, MLX, LLAMA_CPP = "transformers", "mlx-lm", "llama.cpp"  # clients
RECENT = "as in llama-cpp-python 0.3.36"  # whose numbers are easier to find than llama.cpp's builds


@dataclasses.dataclass(frozen=True)
class Need:
    """What must hold about a shape, and the options of a recipe with which it would."""

    holds: Callable[[ModelConfig], bool]
    option: Callable[[ModelConfig], str]


@dataclasses.dataclass(frozen=True)
class Home:
    """A class of another program that computes what our model does.

    Attributes:
        client: the program.
        name: what it calls the class: its model_type, or architecture.
        least: the first version of the client that has it; None: older than anything in use.
        needs: what must hold about our model.
        keys: the class's own keys for a shape, without those of the tokenizer.
        knows_scale: whether it has a key for `embedding_scale`; else that is folded into the weights.
        own_head: whether it stores a head even where that is the embedding once more.
        turns_neighbours: whether rotary positions turn neighbouring channels, not those half a head apart.
    """

    client: str
    name: str
    least: str | None
    needs: tuple[Need, ...]
    keys: Callable[[ModelConfig], dict[str, Any]]
    knows_scale: bool = False
    own_head: bool = False
    turns_neighbours: bool = False

    def unmet(self, config: ModelConfig) -> list[str]:
        """The options that a recipe would need for its model to be at home here."""
        return [need.option(config) for need in self.needs if not need.holds(config)]

    def version(self) -> str:
        """The client, and from which version on."""
        return f"{self.client} {self.least} or later" if self.least else self.client


def home(client: str, config: ModelConfig) -> Home | None:
    """The class of `client` that computes what a model of this shape does; None if there is none."""
    return next((row for row in HOMES if row.client == client and not row.unmet(config)), None)


def refusal(client: str, config: ModelConfig) -> str:
    """Why a model of this shape has no home in `client`, and the fewest options that would give it one; windows are
    kept where as few do."""
    unmet = [row.unmet(config) for row in HOMES if row.client == client]
    options = min(unmet, key=lambda options: (len(options), NO_WINDOWS.option(config) in options))
    return f"no class of {client} computes what this model does; trained with {' '.join(options)} it would have one"


def settled(row: Home, config: ModelConfig, weights: Mapping[str, "Tensor"]) -> tuple[ModelConfig, dict[str, "Tensor"]]:
    """A shape and its weights, by our names, as the class can have them: the same function."""
    scale, weights = config.embedding_scale, dict(weights)
    if scale != 1 and not row.knows_scale:
        parts = "attention.output|feed_forward.down"
        if config.qk_norm:  # with the same eps as the stream's
            parts += "|attention.query|attention.key"
        scaled = re.compile(rf"(position_embedding|blocks\.\d+\.({parts}))\.(weight|bias)")
        weights = {name: tensor / scale if scaled.fullmatch(name) else tensor for name, tensor in weights.items()}
        config = dataclasses.replace(config, embedding_scale=1.0, norm_eps=config.norm_eps / scale**2)
    if row.own_head and config.tied_head:
        weights["head.weight"] = weights["embedding.weight"]
        config = dataclasses.replace(config, tied_head=False)
    return config, weights


def changes(row: Home, config: ModelConfig) -> list[str]:
    """What `settled` changes, in words."""
    found = []
    if config.embedding_scale != 1 and not row.knows_scale:
        found.append(f"embedding_scale {config.embedding_scale:g} is folded into the weights")
    if row.own_head and config.tied_head:
        found.append("the head, which is the embedding, is stored apart")
    return found


def layer_types(config: ModelConfig) -> list[str]:
    """Of each layer, as transformers names them."""
    return [SLIDING if config.layer_window(layer) else FULL for layer in range(config.n_layers)]


def _is(key: str, value: object) -> Need:
    written = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return Need(lambda config: getattr(config, key) == value, lambda config: f"model.{key}={written}")


def _base(config: ModelConfig) -> float:
    """The rotary base of a model that has one."""
    return config.rope_base if SLIDING in layer_types(config) else config.rope_base_global


ROPE, RMS, SWIGLU, NO_BIAS = (
    _is("positions", "rope"), _is("norm", "rms"), _is("feed_forward", "swiglu"), _is("bias", False)
)  # fmt: skip
PLAIN, NORMALISED = _is("qk_norm", False), _is("qk_norm", True)
NO_WINDOWS = Need(lambda config: SLIDING not in layer_types(config), lambda config: "model.window=null")
WINDOWS_EVERYWHERE = Need(lambda config: FULL not in layer_types(config), lambda config: "model.global_every=null")
SOME_WINDOWS = Need(lambda config: SLIDING in layer_types(config), lambda config: "model.window=128")
SOME_GLOBAL = Need(lambda config: FULL in layer_types(config), lambda config: f"model.global_every={config.n_layers}")
ONE_BASE = Need(
    lambda config: len({*layer_types(config)}) == 1 or config.rope_base == config.rope_base_global,
    lambda config: f"model.rope_base_global={config.rope_base:g}",
)
EQUAL_HEADS = Need(lambda c: c.n_kv_heads == c.n_heads, lambda c: f"model.n_kv_heads={c.n_heads}")
PLAIN_HEADS = Need(lambda c: c.d_head * c.n_heads == c.d_model, lambda c: "model.head_dim=null")
FOURFOLD = Need(lambda c: c.d_ff == 4 * c.d_model, lambda c: f"model.d_ff={4 * c.d_model}")
LLAMA = (ROPE, RMS, SWIGLU, NO_BIAS)
GPT2 = (
    _is("positions", "learned"), _is("norm", "layer"), _is("feed_forward", "gelu"), _is("bias", True), PLAIN,
    NO_WINDOWS, EQUAL_HEADS, PLAIN_HEADS,
)  # fmt: skip


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
    }


def _one_base(config: ModelConfig) -> dict[str, Any]:
    """Where transformers 5 reads it, and where older versions and mlx-lm do."""
    return {"rope_theta": _base(config), "rope_parameters": _rope(_base(config))}


def _rope(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


def _windows(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.window, "layer_types": layer_types(config)}


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    windows = _windows(config) if SLIDING in layer_types(config) else {"sliding_window": None}
    return _llama(config) | _one_base(config) | windows | {"use_sliding_window": "layer_types" in windows}


def _granite_swa(config: ModelConfig) -> dict[str, Any]:
    bases = {SLIDING: config.rope_base, FULL: config.rope_base_global}
    return _llama(config) | _windows(config) | {
        "rope_parameters": _rope(_base(config)),
        "layer_rope_theta": [bases[layer_type] for layer_type in layer_types(config)],
        "attention_multiplier": config.d_head**-0.5,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "mlp_bias": False,
    }  # fmt: skip


def _mellum(config: ModelConfig) -> dict[str, Any]:
    bases = {SLIDING: _rope(config.rope_base), FULL: _rope(config.rope_base_global)}
    return _llama(config) | _windows(config) | {"rope_parameters": bases}


def _dense_mellum(config: ModelConfig) -> dict[str, Any]:
    """Without experts."""
    return _mellum(config) | {"mlp_layer_types": ["dense"] * config.n_layers}


def _mellum_of_one(config: ModelConfig) -> dict[str, Any]:
    """One expert of one, which the softmax over it gives the weight 1: mlx-lm has no layers without experts."""
    one = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": config.d_ff, "norm_topk_prob": True}
    return _mellum(config) | one


def _mimo_v2_flash(config: ModelConfig) -> dict[str, Any]:
    """Without experts and sinks. Its sliding_window_size is the window, as ours."""
    heads = {"num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
             "head_dim": config.d_head, "v_head_dim": config.d_head}  # fmt: skip
    return _llama(config) | heads | {f"swa_{key}": value for key, value in heads.items()} | {
        "hybrid_layer_pattern": [int(layer_type == SLIDING) for layer_type in layer_types(config)],
        "moe_layer_freq": [0] * config.n_layers,
        "add_swa_attention_sink_bias": False,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": config.window,
        "layernorm_epsilon": config.norm_eps,
        "rope_theta": config.rope_base_global,
        "swa_rope_theta": config.rope_base,
        "partial_rotary_factor": 1,
        "attention_value_scale": None,
        # Of experts that no layer has; with their keys, for the tokenizer is looked for by a strict config.
        "n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": config.d_ff, "n_shared_experts": None,
        "routed_scaling_factor": 1.0, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "n_group": 1, "topk_group": 1,
    }  # fmt: skip


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.context,
        "n_ctx": config.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "scale_attn_weights": True,
    }


def _gguf(config: ModelConfig) -> dict[str, Any]:
    """Metadata of a GGUF file, without the architecture in front of each."""
    eps = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        f"attention.{eps}": config.norm_eps,
    }


def _gguf_rope(config: ModelConfig) -> dict[str, Any]:
    widths = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), config.d_head)
    return _gguf(config) | widths | {"rope.freq_base": _base(config)}


def _gguf_windows(config: ModelConfig) -> dict[str, Any]:
    """Two bases: `freq_base` is that of the layers without a window."""
    return _gguf_rope(config) | {
        "rope.freq_base": config.rope_base_global,
        "rope.freq_base_swa": config.rope_base,
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": [layer_type == SLIDING for layer_type in layer_types(config)],
        "attention.key_length_swa": config.d_head,
        "attention.value_length_swa": config.d_head,
        "rope.dimension_count_swa": config.d_head,
        "expert_feed_forward_length": config.d_ff,
    }


def _step35(config: ModelConfig) -> dict[str, Any]:
    """Layers without a window turn half of rope.dimension_count there."""
    return _gguf_windows(config) | {"rope.dimension_count": 2 * config.d_head}


HOMES = (
    Home(TRANSFORMERS, "llama", None, (*LLAMA, PLAIN, NO_WINDOWS), lambda c: _llama(c) | _one_base(c)),
    Home(TRANSFORMERS, "gpt2", None, GPT2, _gpt2),
    Home(TRANSFORMERS, "mistral", "4.34", (*LLAMA, PLAIN, WINDOWS_EVERYWHERE),
         lambda c: _llama(c) | _one_base(c) | {"sliding_window": c.window}),
    Home(TRANSFORMERS, "qwen3", "4.53", (*LLAMA, NORMALISED, ONE_BASE), _qwen3),
    Home(TRANSFORMERS, "ministral", "4.57", (*LLAMA, PLAIN, ONE_BASE),
         lambda c: _llama(c) | _one_base(c) | _windows(c)),
    Home(TRANSFORMERS, "granite_swa", "5.15", (*LLAMA, PLAIN), _granite_swa, knows_scale=True),
    Home(TRANSFORMERS, "mellum", "5.10", (*LLAMA, NORMALISED), _dense_mellum),
    Home(MLX, "llama", None, (*LLAMA, PLAIN, NO_WINDOWS), lambda c: _llama(c) | _one_base(c)),
    Home(MLX, "gpt2", None, (*GPT2, FOURFOLD, _is("tied_head", True)), _gpt2),
    Home(MLX, "qwen3", "0.24", (*LLAMA, NORMALISED, NO_WINDOWS), lambda c: _llama(c) | _one_base(c)),
    Home(MLX, "llama", "0.27", (*LLAMA, PLAIN, ONE_BASE, SOME_GLOBAL),
         lambda c: _llama(c) | _one_base(c) | _windows(c)),
    Home(MLX, "mimo_v2_flash", "0.30", (*LLAMA, PLAIN, SOME_GLOBAL), _mimo_v2_flash, own_head=True),
    Home(MLX, "mellum", "0.32", (*LLAMA, NORMALISED, SOME_GLOBAL), _mellum_of_one),
    Home(LLAMA_CPP, "llama", None, (*LLAMA, PLAIN, NO_WINDOWS), _gguf_rope, turns_neighbours=True),
    Home(LLAMA_CPP, "gpt2", None, GPT2, _gguf),
    Home(LLAMA_CPP, "qwen3", None, (*LLAMA, NORMALISED, NO_WINDOWS), _gguf_rope),
    Home(LLAMA_CPP, "mimo2", RECENT, (*LLAMA, PLAIN, SOME_WINDOWS), _gguf_windows, own_head=True),
    Home(LLAMA_CPP, "step35", RECENT, (*LLAMA, NORMALISED, SOME_WINDOWS), _step35, own_head=True),
)  # fmt: skip
