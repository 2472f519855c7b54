"""Flow: a decoder transformer with grouped-query attention, sliding windows, RoPE, SwiGLU and RMSNorm.

Each block is x + attention(norm(x)), then x + feed_forward(norm(x)); the output head shares the embedding's weights.
Most layers see a window, every N-th sees everything. By config it is also the older models: LayerNorm, GELU, learned
positions, biases, dropout, an untied head (GPT-2), normalised queries and keys (Qwen3). Names: B batch, T tokens,
H query heads, K key/value heads, D head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import initial
from models.config import ModelConfig
from models.dropout import Dropout
from models.initial import Embedding, Linear
from models.kernels.attention import Layout, Mask, attend_to_cache, attention, kernel_for
from models.kernels.fused import linears, rms_norm, rotate, swiglu
from models.state import LayerCache, State

Rotation = tuple[Tensor, Tensor] | None  # cos and sin of each position; None: the model turns nothing
FIRST_ROWS = 32_768  # positions of a rotary table at first


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), computed in fp32 (float64 in a model of float64) and returned in
    x's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.float(), self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias (Ba et al. 2016), computed in fp32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream that `config` asks for."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, config.bias)


class RotaryTable(nn.Module):
    """cos and sin of each position's rotation (RoFormer, Su et al. 2021), in fp32; pairs are (i, i + D/2). Of a very
    long context only the beginning is there until `reach` asks for more."""

    def __init__(self, context: int, d_head: int, base: float):
        super().__init__()
        self.context, self.base = context, base
        rows = min(context, FIRST_ROWS)
        self.register_buffer("cos", torch.empty(rows, d_head), persistent=False)  # each angle at i and at i + D/2
        self.register_buffer("sin", torch.empty(rows, d_head), persistent=False)  # negative in the first half
        self.compute()

    def compute(self) -> None:
        """Fill the tables; again after a model that was built on the meta device has been given memory."""
        if self.cos.is_meta:
            return
        rows, d_head = self.cos.shape
        frequencies = self.base ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
        self.cos.copy_(torch.cat([angles.cos(), angles.cos()], dim=1))
        self.sin.copy_(torch.cat([-angles.sin(), angles.sin()], dim=1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def reach(self, length: int) -> None:
        """Have the positions below `length`, or those of the whole context."""
        rows = min(length, self.context)
        if rows <= len(self.cos):
            return
        rows = min(max(rows, 2 * len(self.cos)), self.context)
        self.cos, self.sin = (old.new_empty(rows, old.shape[1]) for old in (self.cos, self.sin))
        self.compute()

    def _apply(self, *arguments, **keywords):
        """Moves between devices, but never to a lower precision: bf16 cannot tell neighbouring positions apart."""
        super()._apply(*arguments, **keywords)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = self.cos.float(), self.sin.float()
            self.compute()
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, 1, D] at `positions` [B or 1, T]."""
        cos, sin = self.cos[positions], self.sin[positions]
        return cos.unsqueeze(-2), sin.unsqueeze(-2)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with a window, or none."""

    JOINED = ("query", "key", "value")

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.window = config.layer_window(layer)
        self.query = Linear(config.d_model, self.n_heads * self.d_head, bias=config.bias)
        self.key = Linear(config.d_model, self.n_kv_heads * self.d_head, bias=config.bias)
        self.value = Linear(config.d_model, self.n_kv_heads * self.d_head, bias=config.bias)
        self.output = Linear(self.n_heads * self.d_head, config.d_model, bias=config.bias)
        self.joined: nn.Module | None = None  # query, key and value in one, for decoding (models/inference/ready.py)
        self.query_norm = RMSNorm(self.d_head, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.d_head, config.norm_eps) if config.qk_norm else None

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, H, T, D], key and value [B, K, T, D] of `x` [B, T, d_model]."""
        if self.joined is None:
            products = linears(x, self.query, self.key, self.value)
            query, key, value = (product.unflatten(-1, (-1, self.d_head)) for product in products)
            if self.query_norm is not None:
                query, key = self.query_norm(query), self.key_norm(key)
            if rotation is not None:
                query, key = rotate(query, *rotation), rotate(key, *rotation)
        else:  # and queries and keys turned together: a token at a time, the number of operations is what costs
            heads = self.joined(x).unflatten(-1, (-1, self.d_head))
            turned, value = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=2)
            if self.query_norm is not None:
                query, key = turned.split((self.n_heads, self.n_kv_heads), dim=2)
                turned = torch.cat([self.query_norm(query), self.key_norm(key)], dim=2)
            if rotation is not None:
                turned = rotate(turned, *rotation)
            query, key = turned.split((self.n_heads, self.n_kv_heads), dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def new_memory(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> LayerCache:
        """For `batch` sequences of at most `length` tokens: a window's ring as a whole, else what grows with them."""
        capacity = min(self.window or length, length)
        ring = capacity if self.window else 0
        return LayerCache(batch, self.n_kv_heads, capacity, self.d_head, device, dtype, ring)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        query, key, value = self._project(x, rotation)
        out = attention(query, key, value, self.window, mask)
        return self.output(out.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, rotation: Rotation, cache: LayerCache, state: State) -> Tensor:
        query, key, value = self._project(x, rotation)
        keys, values, visible = cache.extend(key, value, state)
        out = attend_to_cache(query, keys, values, visible)
        return self.output(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    JOINED = ("gate", "up")

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.joined: nn.Module | None = None  # gate and up in one, for decoding

    def forward(self, x: Tensor) -> Tensor:
        products = linears(x, self.gate, self.up) if self.joined is None else self.joined(x).chunk(2, dim=-1)
        return self.down(swiglu(*products))


class GELU(nn.Module):
    """down(gelu(up(x))) with the tanh form of GPT-2 (Hendrycks & Gimpel 2016)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy of the residual stream."""

    DROPOUTS = 2

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = SwiGLU(config) if config.feed_forward == "swiglu" else GELU(config)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, dropout: Dropout | None = None) -> Tensor:
        update = self.attention(self.attention_norm(x), rotation, mask)
        x = x + (dropout(update, 0) if dropout else update)
        update = self.feed_forward(self.feed_forward_norm(x))
        return x + (dropout(update, 1) if dropout else update)

    def new_memory(self, batch: int, device: torch.device, dtype: torch.dtype, length: int) -> LayerCache:
        """What this layer remembers of `batch` sequences of at most `length` tokens."""
        return self.attention.new_memory(batch, device, dtype, length)

    def step(self, x: Tensor, rotation: Rotation, memory: LayerCache, state: State) -> Tensor:
        x = x + self.attention.step(self.attention_norm(x), rotation, memory, state)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """The Flow model. Built by `models.build_model`; the methods are those every architecture has."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embedding = Embedding(config.context, config.d_model)
        else:
            kinds = {config.layer_window(layer) is None for layer in range(config.n_layers)}
            local, everywhere = (
                RotaryTable(config.context, config.d_head, base) if is_global in kinds else None
                for is_global, base in ((False, config.rope_base), (True, config.rope_base_global))
            )
            self.rotary_local, self.rotary_global = local, everywhere
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = make_norm(config)
        self.head = None if config.tied_head else Linear(config.d_model, config.vocab_size, bias=False)

    def initialise(self, seed: int) -> None:
        """Give every weight its first value, whole parameters and shards alike, and fill the rotary tables.

        Weights are a function of (seed, name) alone: std 1/sqrt(fan-in), smaller where a sub-layer writes to the
        residual stream (GPT-2's depth scaling), embeddings and head small enough that first logits are nearly even.
        With `copy_init`, attention's output matrix starts as its value matrix transposed, so that what a head looks at
        is added to the residual stream as it is (mimetic initialisation, Trockman & Kolter 2023). Small models then
        learn to copy from their context in a few hundred steps instead of a few thousand.
        """
        for name, parameter in self.named_parameters():
            initial.fill(parameter, lambda rows, name=name: self._first_weights(seed, name, rows))
        self.compute_tables(self.embedding.weight.device)

    def compute_tables(self, device: torch.device | str) -> None:
        """Make the rotary tables, which are no weights and in no checkpoint, on `device`."""
        for module in self.modules():
            if isinstance(module, RotaryTable):
                module.to_empty(device=device)
                module.compute()

    def _first_weights(self, seed: int, name: str, rows: slice) -> Tensor:
        """Rows `rows` of the parameter `name` at the start."""
        shape, config = self.get_parameter(name).shape, self.config
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)[rows]
        depth_scale = (2 * config.n_layers) ** -0.5
        if name.endswith("attention.output.weight") and config.copy_init:
            name = name.replace("output", "value")
            value = self._first_weights(seed, name, slice(None)).unflatten(0, (config.n_kv_heads, config.d_head))
            value = value.repeat_interleave(config.n_heads // config.n_kv_heads, dim=0)  # [H, D, d_model]
            return value.flatten(0, 1).T[rows] * (config.copy_init * depth_scale)
        if name in ("embedding.weight", "position_embedding.weight", "head.weight"):
            std = 0.3 * config.d_model**-0.5
        else:
            std = shape[1] ** -0.5
        if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
            std *= depth_scale
        return initial.normal(seed, name, shape, rows).mul_(std)

    @property
    def head_weight(self) -> Tensor:
        """[V, d_model]: logits are hidden_states @ head_weight.T."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of each next token. A document in `document_ids` [B, T] is a run of equal ids; tokens of
        different documents do not see each other, and positions restart with each."""
        return self._logits(self.hidden_states(input_ids, document_ids))

    def hidden_states(
        self, input_ids: Tensor, document_ids: Tensor | None = None, dropout_seeds: Tensor | None = None
    ) -> Tensor:
        """[B, T, d_model] after the final norm. In training mode `dropout_seeds` [B] int64 decide what is dropped of
        each row; without them nothing is.

        Raises:
            ValueError: T is more than the model's context.
        """
        length = input_ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.config.context}")
        kernel = kernel_for(input_ids.device, self.config.d_head, self._activation_dtype(), length)
        layout = Layout.of(document_ids, length, input_ids.device, kernel)
        rotations = self._rotations(layout.positions, length)
        masks = {window: layout.mask(window) for window in {block.attention.window for block in self.blocks}}
        drops = self.training and self.config.dropout > 0 and dropout_seeds is not None
        x = self._embed(input_ids, layout.positions)
        x = Dropout.of(dropout_seeds, self.config.dropout)(x, 0) if drops else x
        for layer, block in enumerate(self.blocks):
            window = block.attention.window
            place = 1 + layer * Block.DROPOUTS
            dropout = Dropout.of(dropout_seeds, self.config.dropout, place) if drops else None
            arguments = (x, rotations[window is None], masks[window], dropout)
            if self.training and self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return self.final_norm(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[B, T, V] of hidden states [B, T, d_model]."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[B, T, d_model] that enters the first block."""
        x = self.embedding(input_ids) * self.config.embedding_scale
        return x + self.position_embedding(positions) if self.config.positions == "learned" else x

    def _activation_dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        weight = self.embedding.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype if weight.is_floating_point() else torch.float32  # int8 weights have fp32 activations

    def new_state(self, batch: int, left_padding: Tensor | None = None, length: int | None = None) -> State:
        """An empty decoding state for `batch` sequences; row b's first `left_padding[b]` inputs are padding. Caches
        grow with what is fed; at most `length` tokens, padding included, if that is given."""
        device, dtype = self.embedding.weight.device, self._activation_dtype()
        length = min(length or self.config.context, self.config.context)
        layers = [block.new_memory(batch, device, dtype, length) for block in self.blocks]
        return State(layers, batch, self.config.context, left_padding)

    def step(self, input_ids: Tensor, state: State, only_last: bool = False) -> Tensor:
        """Logits [B, t, V] of `t` more tokens `input_ids` [B, t] after what `state` has seen; `state` takes them in.
        `only_last`: those of the last token alone, [B, 1, V], for of a long prompt and a large vocabulary all of them
        would fill a card.

        Raises:
            ValueError: the tokens would pass the end of the model's context.
        """
        state.reserve(input_ids.shape[1])
        positions = state.positions(input_ids.shape[1], input_ids.device)
        rotations = self._rotations(positions, state.span or state.length + input_ids.shape[1])
        x = self._embed(input_ids, positions)
        for block, memory in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, rotations[block.attention.window is None], memory, state)
        state.advance(input_ids.shape[1])
        return self._logits(self.final_norm(x[:, -1:] if only_last else x))

    def _rotations(self, positions: Tensor, length: int) -> tuple[Rotation, Rotation]:
        """(cos, sin) of windowed layers, then of global ones, at positions below `length`; None for a kind that there
        is not."""
        if self.config.positions == "learned":
            return None, None
        rotations: list[Rotation] = []
        for table in (self.rotary_local, self.rotary_global):
            if table is not None:
                table.reach(length)
            rotations.append(None if table is None else table(positions))
        return tuple(rotations)
