"""Flow: a decoder transformer with grouped-query attention, sliding windows, RoPE, SwiGLU and RMSNorm.

Each block is x + attention(norm(x)), then x + feed_forward(norm(x)); the output head shares the embedding's weights.
Most layers see a window, every N-th sees everything. Names: B batch, T tokens, H query heads, K key/value heads,
D head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Layout, attend_to_cache, attention
from models.config import ModelConfig
from models.decoding import LayerCache, State


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), computed in fp32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class RotaryTable(nn.Module):
    """cos and sin of every position's rotation (RoFormer, Su et al. 2021), in fp32; pairs are (i, i + D/2)."""

    def __init__(self, context: int, d_head: int, base: float):
        super().__init__()
        frequencies = base ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles = torch.arange(context, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, T, D/2] at `positions` [B or 1, T]."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, heads, T, D] turned by its positions' angles, computed in fp32 and returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with a window, or none, and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.window = config.layer_window(layer)
        self.query = nn.Linear(config.d_model, self.n_heads * self.d_head, bias=False)
        self.key = nn.Linear(config.d_model, self.n_kv_heads * self.d_head, bias=False)
        self.value = nn.Linear(config.d_model, self.n_kv_heads * self.d_head, bias=False)
        self.output = nn.Linear(self.n_heads * self.d_head, config.d_model, bias=False)

    def _project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, H, T, D], key and value [B, K, T, D] of `x` [B, T, d_model]."""
        query = self.query(x).unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)
        key = self.key(x).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        return rotate(query, *rotation), rotate(key, *rotation), value

    def copy_values(self, strength: float) -> None:
        """Make the output matrix `strength` times the value matrix transposed, head by head."""
        value = self.value.weight.unflatten(0, (self.n_kv_heads, self.d_head))  # [K, D, d_model]
        value = value.repeat_interleave(self.n_heads // self.n_kv_heads, dim=0)  # [H, D, d_model]
        self.output.weight.copy_(value.flatten(0, 1).T * strength)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        query, key, value = self._project(x, rotation)
        out = attention(query, key, value, self.window, mask)
        return self.output(out.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: LayerCache, state: State) -> Tensor:
        query, key, value = self._project(x, rotation)
        keys, values, visible = cache.extend(key, value, state)
        out = attend_to_cache(query, keys, values, visible)
        return self.output(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def step(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: LayerCache, state: State) -> Tensor:
        x = x + self.attention.step(self.attention_norm(x), rotation, cache, state)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """The Flow model. Built by `models.build_model`; the methods are those every architecture has."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.rotary_local = RotaryTable(config.context, config.d_head, config.rope_base)
        self.rotary_global = RotaryTable(config.context, config.d_head, config.rope_base_global)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights from `seed`: std 1/sqrt(fan-in), smaller where a sub-layer writes to the residual stream
        (GPT-2's depth scaling), and an embedding small enough that first logits are nearly even.

        With `copy_init`, attention's output matrix starts as its value matrix transposed, so that what a head looks at
        is added to the residual stream as it is (mimetic initialisation, Trockman & Kolter 2023). Small models then
        learn to copy from their context in a few hundred steps instead of a few thousand.
        """
        generator = torch.Generator().manual_seed(seed)
        depth_scale = (2 * self.config.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            std = 0.4 * self.config.d_model**-0.5 if name == "embedding.weight" else parameter.shape[1] ** -0.5
            if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
                std *= depth_scale
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if self.config.copy_init:
            for block in self.blocks:
                block.attention.copy_values(self.config.copy_init * depth_scale)

    @property
    def head_weight(self) -> Tensor:
        """[V, d_model]: logits are hidden_states @ head_weight.T; tied to the embedding."""
        return self.embedding.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of each next token. A document in `document_ids` [B, T] is a run of equal ids; tokens of
        different documents do not see each other, and positions restart with each."""
        return F.linear(self.hidden_states(input_ids, document_ids), self.head_weight)

    def hidden_states(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """[B, T, d_model] after the final norm.

        Raises:
            ValueError: T is more than the model's context.
        """
        length = input_ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.config.context}")
        layout = Layout.of(document_ids, length, input_ids.device)
        rotations = self._rotations(layout.positions)
        masks = {window: layout.mask(window) for window in {block.attention.window for block in self.blocks}}
        x = self.embedding(input_ids) * self.config.embedding_scale
        for block in self.blocks:
            window = block.attention.window
            arguments = (x, rotations[window is None], masks[window])
            if self.training and self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return self.final_norm(x)

    def new_state(self, batch: int, left_padding: Tensor | None = None) -> State:
        """An empty decoding state for `batch` sequences; row b's first `left_padding[b]` inputs are padding."""
        weight = self.embedding.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        caches = [
            LayerCache(batch, self.config.n_kv_heads, entries, self.config.d_head, weight.device, dtype)
            for entries in self.config.cache_entries()
        ]
        return State(caches, self.config.context, left_padding)

    def step(self, input_ids: Tensor, state: State) -> Tensor:
        """Logits [B, t, V] of `t` more tokens `input_ids` [B, t] after what `state` has seen; `state` takes them in.

        Raises:
            ValueError: the tokens would pass the end of the model's context.
        """
        state.reserve(input_ids.shape[1])
        rotations = self._rotations(state.positions(input_ids.shape[1], input_ids.device))
        x = self.embedding(input_ids) * self.config.embedding_scale
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block.step(x, rotations[block.attention.window is None], cache, state)
        state.advance(input_ids.shape[1])
        return F.linear(self.final_norm(x), self.head_weight)

    def _rotations(self, positions: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(cos, sin) of windowed layers, then of global ones."""
        return self.rotary_local(positions), self.rotary_global(positions)
