"""What a model is made of, and what follows from that by arithmetic alone: parameters, FLOPs, cache sizes.

A plain dataclass without torch, so that plans and config checks cost nothing.
"""

import dataclasses
from typing import Literal, get_args, get_origin


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. `problems()` tells what is impossible about it."""

    architecture: str = "flow"  # "flow": a decoder transformer
    vocab_size: int = 4096
    context: int = 2048  # longest sequence the model is built for
    n_layers: int = 6
    d_model: int = 256
    n_heads: int = 8
    n_kv_heads: int = 2  # grouped-query attention: each key/value head serves n_heads / n_kv_heads query heads
    head_dim: int | None = None  # None: d_model / n_heads
    d_ff: int = 640  # hidden width of the feed-forward
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"  # gelu: two matrices, as in GPT-2
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned"] = "rope"  # learned: one vector a position, added to the embeddings
    bias: bool = False  # of linear layers and of LayerNorm
    qk_norm: bool = False  # normalise each head's queries and keys before they are turned
    tied_head: bool = True  # the output head shares the embedding's weights
    dropout: float = 0.0  # of the embeddings and of what each sub-layer adds, drawn from (seed, sample)
    window: int | None = 128  # a windowed layer's token sees itself and the window - 1 before it; None: no windows
    global_every: int | None = 6  # every N-th layer attends to everything; None: no global layers
    rope_base: float = 10_000.0  # of windowed layers
    rope_base_global: float = 1_000_000.0  # of global layers
    norm_eps: float = 1e-6
    embedding_scale: float = 1.0  # multiplies embeddings where they enter the first block (Gemma's is sqrt(d_model))
    copy_init: float = 0.0  # how strongly attention starts out copying what it looks at; 0: random (see `initialise`)
    gradient_checkpointing: bool = False  # recompute each block in the backward pass instead of keeping it

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    def layer_window(self, layer: int) -> int | None:
        """The window of layer `layer` (from 0), or None where it attends to everything."""
        is_global = self.global_every is not None and (layer + 1) % self.global_every == 0
        return None if is_global else self.window

    def identity(self) -> dict[str, object]:
        """What two configs must agree on for weights of one to mean the same in the other: not how they were first
        drawn, how they are trained, or, with rotary positions, how long a sequence may be."""
        fields = dataclasses.asdict(self) | {"head_dim": self.d_head}
        windows = {self.layer_window(layer) for layer in range(self.n_layers)}
        free = {"copy_init", "dropout", "gradient_checkpointing"}
        free |= {"context"} if self.positions == "rope" else {"rope_base", "rope_base_global"}
        free |= {"rope_base"} if windows == {None} else set()
        free |= {"rope_base_global"} if None not in windows else set()
        if len(windows) == 1:  # then it does not matter how often another kind of layer would come
            free.add("global_every")
            fields["window"] = windows.pop()
        return {key: value for key, value in fields.items() if key not in free}

    def problems(self) -> list[tuple[str, object, str]]:
        """(key, value, what would be right) for everything impossible about this shape."""
        found: list[tuple[str, object, str]] = []

        def expect(right: bool, key: str, remedy: str) -> None:
            if not right:
                found.append((key, getattr(self, key), remedy))

        expect(self.architecture == "flow", "architecture", "use flow")
        for field in dataclasses.fields(self):
            if get_origin(field.type) is Literal:
                choices = get_args(field.type)
                expect(getattr(self, field.name) in choices, field.name, f"use {' or '.join(choices)}")
        for key in ("vocab_size", "context", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff"):
            expect(getattr(self, key) >= 1, key, "use 1 or more")
        for key in ("head_dim", "window", "global_every"):
            expect(getattr(self, key) is None or getattr(self, key) >= 1, key, "use 1 or more, or null")
        for key in ("rope_base", "rope_base_global", "norm_eps", "embedding_scale"):
            expect(getattr(self, key) > 0, key, "use a number above 0")
        expect(self.copy_init >= 0, "copy_init", "use 0 or more")
        expect(0 <= self.dropout < 1, "dropout", "use a number from 0 up to, not including, 1")
        wrong = {key for key, *_ in found}
        if not wrong & {"n_heads", "n_kv_heads"}:
            expect(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", f"use a divisor of n_heads ({self.n_heads})")
        if wrong & {"n_heads", "d_model", "head_dim"}:
            return found
        if self.head_dim is None and self.d_model % self.n_heads:
            expect(False, "n_heads", f"use a divisor of d_model ({self.d_model})")
        elif self.positions == "rope":
            expect(self.d_head % 2 == 0, "head_dim", f"use an even head width, RoPE turns pairs ({self.d_head} now)")
        return found

    def parameters(self) -> dict[str, int]:
        """Parameter counts: `embedding` (tokens, learned positions, and a head of its own), `hidden` (all blocks and
        the last norm), `total`."""
        tables = 1 if self.tied_head else 2
        positions = self.context * self.d_model if self.positions == "learned" else 0
        embedding = tables * self.vocab_size * self.d_model + positions
        hidden = self.n_layers * self._block_matrices + self.vectors
        return {"embedding": embedding, "hidden": hidden, "total": embedding + hidden}

    @property
    def vectors(self) -> int:
        """Parameters that are no matrices: norms and biases."""
        a_norm = self.d_model * (2 if self.norm == "layer" and self.bias else 1)
        heads, kv_heads = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        ff_biases = self.d_ff * (2 if self.feed_forward == "swiglu" else 1) + self.d_model
        biases = heads + 2 * kv_heads + self.d_model + ff_biases if self.bias else 0
        qk_norms = 2 * self.d_head if self.qk_norm else 0
        return self.n_layers * (2 * a_norm + biases + qk_norms) + a_norm

    @property
    def _block_matrices(self) -> int:
        """Parameters of one block's matrices."""
        attention = self.d_model * self.d_head * 2 * (self.n_heads + self.n_kv_heads)
        return attention + (3 if self.feed_forward == "swiglu" else 2) * self.d_model * self.d_ff

    def flops_per_token(self, context: int) -> int:
        """Training FLOPs a token (forward and backward) at `context`, counted as 6 a weight that is multiplied plus
        12 a head channel and visible key (Kaplan et al. 2020, Chowdhery et al. 2022); recomputation not counted."""
        matrices = self.n_layers * self._block_matrices + self.vocab_size * self.d_model  # the head, not the embedding
        keys = sum(_mean_visible_keys(context, self.layer_window(layer)) for layer in range(self.n_layers))
        return int(6 * matrices + 12 * self.n_heads * self.d_head * keys)

    def cache_entries(self) -> list[int]:
        """Key/value entries each layer keeps while decoding one sequence."""
        windows = [self.layer_window(layer) for layer in range(self.n_layers)]
        return [self.context if window is None else min(window, self.context) for window in windows]


def _mean_visible_keys(context: int, window: int | None) -> float:
    """Mean over positions 0..context-1 of how many keys a causal query sees, at most `window`."""
    window = min(window or context, context)
    return (window * (window + 1) / 2 + (context - window) * window) / context
