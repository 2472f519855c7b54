"""Decoding: what a model remembers between tokens, and how the next token is drawn.

`State` holds one `LayerCache` a layer: a ring of `window` entries in windowed layers, the whole context in global
ones. Keys are stored after rotation, so the order of entries in a ring does not matter. `generate` is the batched
loop over any model with `new_state` and `step`.

Shapes: B sequences, t new tokens, K key/value heads, S cached entries, D head width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from models.sampling import Sampling


class LayerCache:
    """Keys and values of one layer, [B, K, capacity, D], the entry of position p in slot p % capacity."""

    def __init__(
        self, batch: int, n_kv_heads: int, capacity: int, d_head: int, device: torch.device, dtype: torch.dtype
    ):
        self.capacity = capacity
        self.keys = torch.zeros(batch, n_kv_heads, capacity, d_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def extend(self, key: Tensor, value: Tensor, state: "State") -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in `key` and `value` [B, K, t, D]; return the keys and values to attend to, [B, K, S, D], and
        which of them each new token sees, [B or 1, 1, t, S] bool, or None for all."""
        start, new = state.length, key.shape[2]
        key, value = key.to(self.keys.dtype), value.to(self.values.dtype)
        if new == 1:
            self.keys.narrow(2, start % self.capacity, 1).copy_(key)
            self.values.narrow(2, start % self.capacity, 1).copy_(value)
            filled = min(start + 1, self.capacity)
            keys, values = self.keys, self.values
            if filled < self.capacity:
                keys, values = keys.narrow(2, 0, filled), values.narrow(2, 0, filled)
            if state.left_padding is None:
                return keys, values, None
            slots = torch.arange(filled, device=key.device)
            positions = start - (start - slots) % self.capacity
            visible = positions[None] >= state.left_padding[:, None]
            return keys, values, visible[:, None, None]
        kept = min(start, self.capacity)
        old = torch.arange(start - kept, start, device=key.device)
        keys = torch.cat([self.keys[:, :, old % self.capacity], key], dim=2)
        values = torch.cat([self.values[:, :, old % self.capacity], value], dim=2)
        positions = torch.arange(start - kept, start + new, device=key.device)
        query_positions = positions[kept:, None]
        visible = ((positions <= query_positions) & (positions > query_positions - self.capacity))[None]
        if state.left_padding is not None:
            # a padding token sees itself, so that no row of the softmax is empty
            real = positions[None, None] >= state.left_padding[:, None, None]
            visible = visible & (real | (positions == query_positions))
        last = positions[-min(new, self.capacity) :]
        self.keys[:, :, last % self.capacity] = key[:, :, -len(last) :]
        self.values[:, :, last % self.capacity] = value[:, :, -len(last) :]
        return keys, values, visible[:, None]


class State:
    """What a model has seen of `batch` sequences: every layer's cache and how many tokens went in."""

    def __init__(self, caches: list[LayerCache], context: int, left_padding: Tensor | None):
        self.caches = caches
        self.context = context
        self.left_padding = left_padding if left_padding is not None and bool(left_padding.any()) else None  # [B]
        self.length = 0  # tokens taken in, padding included
        self.end = context + (0 if self.left_padding is None else int(self.left_padding.max()))  # of the last sequence

    def reserve(self, new: int) -> None:
        """Refuse `new` tokens that would fit no sequence's context. A sequence with less padding may be past its end:
        what it gives then means nothing, and it overwrites only what it has itself no more use for."""
        if self.length + new > self.end:
            raise ValueError(f"{self.length} + {new} tokens pass the end of the model's context of {self.context}")

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Of the next `new` tokens, [B or 1, new] int64. Padding does not count; what is past a sequence's context has
        its last position."""
        positions = torch.arange(self.length, self.length + new, device=device)[None]
        if self.left_padding is None:
            return positions
        return (positions - self.left_padding[:, None]).clamp(0, self.context - 1)

    def advance(self, new: int) -> None:
        """Count `new` tokens as seen."""
        self.length += new


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits [B, V] after penalty, temperature and filters, -inf where a token may not be drawn.

    `seen` [B, V] bool marks tokens the repetition penalty applies to.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        too_many = (before >= sampling.top_p) & (before > 0)  # the likeliest stays, however small top_p is
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, too_many)
        logits = logits.masked_fill(drop, float("-inf"))
    if sampling.min_p is not None:
        probabilities = logits.softmax(dim=-1)
        floor = sampling.min_p * probabilities.max(dim=-1, keepdim=True).values
        logits = logits.masked_fill(probabilities < floor, float("-inf"))
    return logits


def prefill(model: torch.nn.Module, input_ids: Tensor, state: State, chunk: int = 512) -> Tensor:
    """Feed `input_ids` [B, T], T > 0, in chunks, so that masks stay small; returns the last token's logits [B, V]."""
    for start in range(0, input_ids.shape[1], chunk):
        logits = model.step(input_ids[:, start : start + chunk], state)
    return logits[:, -1]


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    on_token: Callable[[int, int], None] | None = None,
    entries: int | None = None,
) -> list[list[int]]:
    """Continue every prompt, all together, from a cache.

    Args:
        prompts: token ids, one non-empty list a sequence; lengths may differ (shorter ones are padded on the left).
        stop_ids: a sequence ends at the first of these, which is not returned.
        on_token: called with (row, token id) as each token is drawn.
        entries: of the tokenizer; ids from there on only pad the model's vocabulary, and are never drawn.

    Returns: the new ids of each sequence, without the prompt; at most `max_new_tokens`, fewer at its context's end.
    Each row draws from its own generator, so its text does not depend on what else is in the batch.

    Raises:
        ValueError: a prompt is empty or fills the context.
    """
    if not prompts:
        return []
    sampling = sampling or Sampling()
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt is empty: begin a text with the end-of-text token")
    if longest >= model.config.context:
        raise ValueError(f"a prompt of {longest} tokens fills the model's context of {model.config.context}")
    device = next(model.parameters()).device
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(rows, dtype=torch.int64, device=device)
    with evaluating(model):
        return _continued(model, prompts, input_ids, padding, max_new_tokens, stop_ids, sampling, on_token, entries)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards it is as it was, whatever happens inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _continued(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    input_ids: Tensor,
    padding: Tensor,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    on_token: Callable[[int, int], None] | None,
    entries: int | None,
) -> list[list[int]]:
    device = input_ids.device
    room = [min(max_new_tokens, model.config.context - len(prompt)) for prompt in prompts]
    state = model.new_state(len(prompts), padding)
    logits = prefill(model, input_ids, state)[:, :entries]
    seen = _seen(prompts, logits) if sampling.repetition_penalty != 1.0 else None
    generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(len(prompts))]
    outputs: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for done in range(1, max(room) + 1):
        next_ids = _draw(filter_logits(logits, sampling, seen), sampling, generators)
        for row, token in enumerate(next_ids.tolist()):
            running[row] = running[row] and token not in stop_ids
            if running[row]:
                outputs[row].append(token)
                running[row] = done < room[row]
                if on_token:
                    on_token(row, token)
        if not any(running):
            break
        if seen is not None:
            seen.scatter_(1, next_ids[:, None], True)
        logits = model.step(next_ids[:, None], state)[:, -1, :entries]
    return outputs


def _seen(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(list(prompt), device=logits.device)] = True
    return seen


def _draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """One token id a row, [B] int64."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = logits.softmax(dim=-1)
    draws: Iterator[Tensor] = (
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    )
    return torch.cat(list(draws))
