"""The model's own `step`, in a form that can be traced: its state in tensors instead of Python numbers.

There is no second model. `Decoder` calls `model.step` with a `TracedState`, whose caches hold every layer's keys and
values behind one another in two flat tensors [1, K, E, D], and whose position lies in a spare entry of both. A
graph that is recorded of it serves any number of new tokens, whether they come one by one or longer than a window:

- A cache is written by a blend with zeros and ones, old * (1 - written) + written @ new, never by a slice at a computed
  position: Apple's compilers crash on those (apple/coreai-models #5, apple/coreai-torch #6). All products are by 0 or
  1, so they are exact in any precision.
- A windowed layer keeps its window alone, position p in slot p % window, as `models.state.LayerCache` does.
- Positions are integers until they are compared: fp16 cannot tell 2,049 from 2,048. They are kept as two digits,
  256 * high + low, one in each cache.
- A token past the end of the context is no error, because callers know no context and crash: it stands at the last
  position, sees what is remembered there, and is not remembered itself.

Shapes: q new tokens, K key/value heads, E entries, D head width, S entries of one layer, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.config import ModelConfig

STATES = ("keyCache", "valueCache")  # names of the buffers, as swift-transformers knows them
ALIGNED = 32  # entries: the Neural Engine refuses states of other widths (apple/coremltools #2631)
DIGIT = 256  # of a position: both digits are whole numbers of fp16 up to a context of 524,288
NEVER = -3.0e4  # added where nothing may be seen, or drawn; fp16 holds it


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Where each layer's entries lie in the two flat caches [1, K, E, D]."""

    heads: int  # K
    width: int  # D
    context: int
    windows: tuple[int | None, ...]  # of each layer; None: it sees everything
    entries: tuple[int, ...]  # of each layer: as many as it looks back

    @classmethod
    def of(cls, config: "ModelConfig") -> "CacheLayout":
        """That of a model of this shape."""
        windows = tuple(config.layer_window(layer) for layer in range(config.n_layers))
        return cls(config.n_kv_heads, config.d_head, config.context, windows, tuple(config.cache_entries()))

    @property
    def spare(self) -> int:
        """Entries behind those of all layers: one for the position, and what alignment adds."""
        used = sum(self.entries)
        return -(-(used + 1) // ALIGNED) * ALIGNED - used

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[1, K, E, D] of each of the two caches."""
        return 1, self.heads, sum(self.entries) + self.spare, self.width

    def place(self) -> Tensor:
        """[1, K, spare, D], 1 where a digit of the position lies: at the start of the first head's last entry."""
        place = torch.zeros(1, self.heads, self.spare, self.width)
        place[0, 0, -1, 0] = 1.0
        return place


@dataclasses.dataclass(frozen=True)
class Places:
    """Where `q` new tokens go and what they see in layers of one window, the same for all of them."""

    mask: Tensor  # [1, 1, q, S], or [1, 1, q, S + q] where a layer sees its ring and the new tokens beside it
    written: Tensor  # [S, q] bool: entry s becomes that of new token j


class TracedCache:
    """Keys and values of one layer, [1, K, S, D], as they were before this step; `extend` replaces them.

    Args:
        window: of the layer.
        ring: whether the entries are the last `window` positions alone, each in the place of one before it.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None, ring: bool):
        self.keys, self.values, self.window, self.ring = keys, values, window, ring

    def extend(self, key: Tensor, value: Tensor, state: "TracedState | IndexedState") -> tuple[Tensor, Tensor, Tensor]:
        """Take in `key` and `value` [1, K, q, D]; return the keys and values to attend to and a mask to add."""
        places = state.places[self.window]
        mask = places.mask.to(key.dtype)
        old_keys, old_values = self.keys.to(key.dtype), self.values.to(value.dtype)
        self.keys, self.values = (_blend(old, places.written, new) for old, new in
                                  ((old_keys, key), (old_values, value)))  # fmt: skip
        if not self.ring:
            return self.keys, self.values, mask
        # What a long chunk overwrites in the ring its own first tokens still see
        return torch.cat([old_keys, key], dim=2), torch.cat([old_values, value], dim=2), mask


def _blend(old: Tensor, written: Tensor, new: Tensor) -> Tensor:
    """`old` [1, K, S, D], of which the entries that `written` [S, q] names become those of `new` [1, K, q, D]."""
    written = written.to(new.dtype)
    return old * (1 - written.sum(dim=1, keepdim=True)) + written @ new


def set_position(key_cache: Any, value_cache: Any, position: int) -> None:
    """Make two caches, arrays or tensors [1, K, E, D], those of a state that has seen `position` tokens."""
    key_cache[0, 0, -1, 0], value_cache[0, 0, -1, 0] = divmod(position, DIGIT)


def position(key_cache: Any, value_cache: Any) -> int:
    """How many tokens the state with these two caches has seen."""
    return DIGIT * int(key_cache[0, 0, -1, 0]) + int(value_cache[0, 0, -1, 0])


def _mask(visible: Tensor) -> Tensor:
    """What is added to attention's scores where `visible` [q, S] says so, [1, 1, q, S]."""
    return (1 - visible[None, None].to(torch.float32)) * NEVER


def _at_most(positions: Tensor, most: int) -> Tensor:
    """`positions` [n] int32, none above `most`. Not by clamp, which converters know of floating-point numbers only."""
    return torch.minimum(positions, torch.full_like(positions, most))


class TracedState:
    """What `model.step` asks of a state, kept in tensors: the caches' content, and how many tokens are remembered.

    Args:
        place: the layout's.
    """

    def __init__(self, layout: CacheLayout, key_cache: Tensor, value_cache: Tensor, place: Tensor):
        self.layout, self.place = layout, place
        self.span = layout.context  # rotary tables reach to the end
        keys = key_cache.split([*layout.entries, layout.spare], dim=2)
        values = value_cache.split([*layout.entries, layout.spare], dim=2)
        self.layers = [TracedCache(*parts, ring=parts[2] is not None)
                       for parts in zip(keys, values, layout.windows, strict=False)]  # fmt: skip
        high, low = (spare[-1][0, 0, -1, :1].to(torch.int32) for spare in (keys, values))
        self.length = high * DIGIT + low  # [1], at most the context
        self.places: dict[int | None, Places] = {}

    def reserve(self, new: int) -> None:
        """Work out where `new` tokens go."""
        slots = [(window, entries) for window, entries in zip(self.layout.windows, self.layout.entries, strict=True)]
        fresh = self.length + torch.arange(new, dtype=torch.int32, device=self.length.device)  # [q]
        self.places = {window: self._places(window, entries, fresh) for window, entries in dict(slots).items()}

    def _places(self, window: int | None, entries: int, fresh: Tensor) -> Places:
        slots = torch.arange(entries, dtype=torch.int32, device=fresh.device)
        queries = self._clamped(fresh)[:, None]  # [q, 1]
        if window is None:
            return Places(_mask(slots <= queries), slots[:, None] == fresh)
        last = self.length - 1
        held = last - (last - slots + entries) % entries  # [S], position of each entry; below 0: nothing yet
        in_ring = torch.logical_and(held >= 0, held > queries - window)
        in_chunk = torch.logical_and(fresh <= queries, fresh > queries - window)
        newest = _at_most(self.length + fresh.shape[0], self.layout.context) - 1
        kept = torch.logical_and(fresh <= newest, fresh > newest - entries)
        written = torch.logical_and(slots[:, None] == fresh % entries, kept)
        return Places(_mask(torch.cat([in_ring, in_chunk], dim=1)), written)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Of the next `new` tokens, [1, new] int32."""
        return self._clamped(self.length + torch.arange(new, dtype=torch.int32, device=device))[None]

    def _clamped(self, positions: Tensor) -> Tensor:
        return _at_most(positions, self.layout.context - 1)

    def advance(self, new: int) -> None:
        """Count `new` tokens as seen, as far as there is context."""
        self.length = _at_most(self.length + new, self.layout.context)

    def key_cache(self) -> Tensor:
        """[1, K, E, D] as it is now."""
        return self._flat([layer.keys for layer in self.layers], self.length // DIGIT)

    def value_cache(self) -> Tensor:
        """[1, K, E, D] as it is now."""
        return self._flat([layer.values for layer in self.layers], self.length - self.length // DIGIT * DIGIT)

    def _flat(self, entries: list[Tensor], digit: Tensor) -> Tensor:
        return torch.cat([*entries, digit.to(self.place.dtype) * self.place], dim=2)


class IndexedState:
    """What `model.step` asks of a state, for callers that hold the caches themselves, every layer's as long as the
    text may become, and say where they are.

    Args:
        key_caches, value_caches: [L, 1, K, S, D], as they were before this step.
        start: the position of the first new token; positions come from shapes alone.
    """

    def __init__(self, layout: CacheLayout, key_caches: Tensor, value_caches: Tensor, start: int):
        self.layout, self.start, self.span = layout, start, layout.context
        self.layers = [TracedCache(key_caches[layer], value_caches[layer], window, ring=False)
                       for layer, window in enumerate(layout.windows)]  # fmt: skip
        self.places: dict[int | None, Places] = {}

    def reserve(self, new: int) -> None:
        """Work out where `new` tokens go."""
        entries = self.layers[0].keys.shape[2]
        slots = torch.arange(entries, dtype=torch.int32)
        fresh = self.start + torch.arange(new, dtype=torch.int32)
        for window in dict.fromkeys(self.layout.windows):
            seen = slots <= fresh[:, None]
            if window is not None:
                seen = torch.logical_and(seen, slots > fresh[:, None] - window)
            self.places[window] = Places(_mask(seen), slots[:, None] == fresh)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Of the next `new` tokens, [1, new] int32."""
        return _at_most(self.start + torch.arange(new, dtype=torch.int32), self.layout.context - 1)[None]

    def advance(self, new: int) -> None:
        """The caller counts."""

    def caches(self) -> tuple[Tensor, Tensor]:
        """Both, [L, 1, K, S, D], as they are now."""
        return torch.stack([layer.keys for layer in self.layers]), torch.stack([layer.values for layer in self.layers])


class NewCache:
    """One layer's memory of a step that begins a text and is the only one: the new tokens see each other."""

    def __init__(self, window: int | None):
        self.window = window

    def extend(self, key: Tensor, value: Tensor, state: "NewState") -> tuple[Tensor, Tensor, Tensor]:
        """`key` and `value` [1, K, q, D] themselves, and a mask to add."""
        return key, value, state.masks[self.window].to(key.dtype)


class NewState:
    """What `model.step` asks of a state, for a whole text at once and no memory after it."""

    def __init__(self, layout: CacheLayout):
        self.span = layout.context
        self.layers = [NewCache(window) for window in layout.windows]
        self.masks: dict[int | None, Tensor] = {}

    def reserve(self, new: int) -> None:
        """Work out what each of `new` tokens sees."""
        keys = torch.arange(new, dtype=torch.int32)
        queries = keys[:, None]
        for window in {layer.window for layer in self.layers}:
            seen = keys <= queries
            seen = seen if window is None else torch.logical_and(seen, keys > queries - window)
            self.masks[window] = _mask(seen)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Of the `new` tokens, [1, new] int32."""
        return torch.arange(new, dtype=torch.int32, device=device)[None]

    def advance(self, new: int) -> None:
        """Nothing is remembered."""


class Stateless(nn.Module):
    """`model.step` of a whole text: token ids [1, q] int32 -> logits [1, q, V].

    Args:
        never: tokens that are never drawn: their logits are lowered by 30,000.
    """

    def __init__(self, model: nn.Module, never: Sequence[int] = ()):
        super().__init__()
        self.model = model
        self.layout = CacheLayout.of(model.config)
        lowered = torch.zeros(model.config.vocab_size)
        lowered[list(never)] = NEVER
        self.register_buffer("lowered", lowered if never else None)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._allowed(self.model.step(input_ids, NewState(self.layout)))

    def _allowed(self, logits: Tensor) -> Tensor:
        return logits if self.lowered is None else logits + self.lowered.to(logits.dtype)


class Decoder(Stateless):
    """`model.step` with its state in the buffers `keyCache` and `valueCache` [1, K, E, D], which each call changes. A
    new text begins with buffers of zeros.

    Args:
        dtype: of the buffers.
    """

    def __init__(self, model: nn.Module, never: Sequence[int] = (), dtype: torch.dtype = torch.float32):
        super().__init__(model, never)
        self.register_buffer("keyCache", torch.zeros(self.layout.shape, dtype=dtype))
        self.register_buffer("valueCache", torch.zeros(self.layout.shape, dtype=dtype))
        self.register_buffer("place", self.layout.place())

    def forward(self, input_ids: Tensor) -> Tensor:
        state = TracedState(self.layout, self.keyCache, self.valueCache, self.place)
        logits = self.model.step(input_ids, state)
        # One write a state, after every read; each made just before, or coremltools loses its place (9.1.dev1)
        self.keyCache[:] = state.key_cache().to(self.keyCache.dtype)
        self.valueCache[:] = state.value_cache().to(self.valueCache.dtype)
        return self._allowed(logits)

    def reset(self) -> None:
        """Begin a new text."""
        self.keyCache.zero_()
        self.valueCache.zero_()


class IndexedDecoder(Stateless):
    """`model.step` with caches that the caller holds: token ids [1, q] int32, as many position ids [1, P] as there will
    be tokens with these, key and value caches [L, 1, K, S, D], which it changes -> logits [1, q, V]."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        start = position_ids.shape[1] - input_ids.shape[1]
        state = IndexedState(self.layout, key_cache, value_cache, start)
        logits = self.model.step(input_ids, state)
        keys, values = state.caches()
        key_cache.copy_(keys.to(key_cache.dtype))
        value_cache.copy_(values.to(value_cache.dtype))
        return self._allowed(logits)
