"""Decoding: the batched loop over any model with `new_state` and `step`, and how the next token is drawn.

A sequence's draws are a function of its own seed alone: one number in [0, 1) a token, made on the CPU, picks the token
by the inverse of the cumulative distribution. Neither the other sequences nor padding nor the device take part.

Shapes: B sequences, V vocabulary.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from models.inference import captured
from models.inference.sampling import Sampling
from models.state import GRAIN, State

DRAWN_AT_ONCE = 64  # numbers a sequence: its generator is asked for so many tokens ahead
READ_EVERY = {"cuda": 8}  # tokens, by device: reading them waits for the device, which has nothing to do meanwhile
STILL_RUNNING = 0.75  # of the sequences in the batch, at most: then those that have ended leave it
STILL_RUNNING_CAPTURED = 0.5  # where each batch size costs a recording
TOKENS_AT_ONCE = 4096  # of all prompts together: what they need at once is bounded, their logits above all
ROOM = 256  # new tokens that caches have room for from the start


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits [B, V] after penalty, temperature and filters, -inf where a token may not be drawn.

    `seen` [B, V] bool marks tokens the repetition penalty applies to.
    """
    logits = _penalised(_precise(logits), sampling, seen)
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


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _penalised(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    penalty = sampling.repetition_penalty
    if seen is None or penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, sampling: Sampling, numbers: Tensor, seen: Tensor | None = None) -> Tensor:
    """One token id a row, [B] int64: the first, by id, at which the cumulative probability of what `filter_logits`
    keeps of `logits` [B, V] exceeds the row's number, of `numbers` [B] in [0, 1).

    With `top_k` only so many are looked at, never the whole vocabulary in order; of tokens as likely as the k-th, which
    the filter keeps all, some are then left out.
    """
    ids = None
    if sampling.temperature and sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits if seen is None else _penalised(_precise(logits), sampling, seen)
        ids = logits.topk(sampling.top_k, dim=-1).indices.sort(dim=-1).values
        # by id, as they lie in the vocabulary: two that are all but as likely as each other keep their places
        logits, seen = logits.gather(1, ids), None
    logits = filter_logits(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = logits.softmax(dim=-1).to(numbers.dtype).cumsum(dim=-1)
    place = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp_max(logits.shape[-1] - 1)
    return (place if ids is None else ids.gather(1, place))[:, 0]


class _Numbers:
    """What decides the draws: a column [B] of numbers in [0, 1) a token, each row's from a generator of its own."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        # Python's: of a seed, torch's generators for CPUs read 32 bits
        self._generators = [random.Random(seed % 2**64) for seed in seeds]
        self._device = device
        self._block, self._used = torch.empty(len(seeds), 0), 0

    def next(self) -> Tensor:
        """The next token's."""
        if self._used == self._block.shape[1]:
            drawn = [[generator.random() for _ in range(DRAWN_AT_ONCE)] for generator in self._generators]
            precise = torch.float32 if self._device.type == "mps" else torch.float64  # which MPS does not know
            self._block, self._used = torch.tensor(drawn, dtype=precise, device=self._device), 0
        self._used += 1
        return self._block[:, self._used - 1]

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self._generators = [self._generators[row] for row in rows]
        self._block = self._block[torch.tensor(rows, device=self._device)]


def prefill(model: torch.nn.Module, input_ids: Tensor, state: State, chunk: int | None = None) -> Tensor:
    """Feed `input_ids` [B, T], T > 0, in chunks (None: of a suitable length), so that masks and activations stay
    small; returns the last token's logits [B, V]."""
    chunk = chunk or min(512, max(1, TOKENS_AT_ONCE // len(input_ids)))
    for start in range(0, input_ids.shape[1], chunk):
        logits = model.step(input_ids[:, start : start + chunk], state, only_last=True)
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
    *,
    seeds: Sequence[int] | None = None,
    never: Sequence[int] = (),
    graphs: bool = False,
) -> list[list[int]]:
    """Continue every prompt, all together, from a cache.

    Args:
        prompts: token ids, one non-empty list a sequence; lengths may differ (shorter ones are padded on the left).
        stop_ids: a sequence ends at the first of these, which is not returned.
        on_token: called with (row, token id) as each token is drawn.
        entries: of the tokenizer; ids from there on only pad the model's vocabulary, and are never drawn.
        never: ids that are not drawn (checkpoints.never_drawn).
        seeds: of each sequence's draws, any 64-bit integers; None: from the sampling's seed on, one by one.
        graphs: decode by CUDA graphs where there are some (models/inference/captured.py): for batches on a GPU, where
            asking for operations takes longer than they do.

    Returns: the new ids of each sequence, without the prompt; at most `max_new_tokens`, fewer at its context's end.
    A sequence's draws depend on its own seed alone. What rounding makes of the logits does depend on the batch: in
    fp32, and more so in bf16, another batch may now and then draw another token.

    Raises:
        ValueError: a prompt is empty or fills the context, or there are not as many seeds as prompts.
    """
    if not prompts:
        return []
    sampling = sampling or Sampling()
    seeds = range(sampling.seed, sampling.seed + len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each")
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt is empty: begin a text with the tokenizer's begin_of_text")
    if longest >= model.config.context:
        raise ValueError(f"a prompt of {longest} tokens fills the model's context of {model.config.context}")
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    with evaluating(model):
        return _Batch(model, prompts, max_new_tokens, stop_ids, sampling, seeds, entries, never, graphs).run(on_token)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards it is as it was, whatever happens inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Batch:
    """Sequences that are continued together. A row is a place in the batch, an index one among the prompts."""

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling,
        seeds: Sequence[int],
        entries: int | None,
        never: Sequence[int],
        graphs: bool,
    ):
        self.model, self.sampling, self.entries = model, sampling, entries
        self.stop_ids = set(stop_ids)
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.room = [min(max_new_tokens, model.config.context - len(prompt)) for prompt in prompts]
        self.indices = list(range(len(prompts)))  # of each row
        self.running = set(self.indices)
        self.device = next(model.parameters()).device
        never = [token for token in never if entries is None or token < entries]
        self.never = torch.tensor(never, dtype=torch.int64, device=self.device)
        self.numbers = _Numbers(seeds, self.device)
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * more + list(prompt) for more, prompt in zip(padding, prompts, strict=True)]
        fed = -(-(longest + max(self.room) - 1) // GRAIN) * GRAIN  # at most: the last token drawn is not
        self.state = model.new_state(len(prompts), torch.tensor(padding, device=self.device), fed)
        self.state.hold(min(longest + ROOM, fed))
        recorded = graphs and captured.available(self.device)
        self.captured = captured.CapturedSteps(model, self.state) if recorded else None
        input_ids = torch.tensor(padded, dtype=torch.int64, device=self.device)
        self.logits = self._possible(prefill(model, input_ids, self.state))
        self.seen = self._seen(prompts) if sampling.repetition_penalty != 1.0 else None

    def run(self, on_token: Callable[[int, int], None] | None) -> list[list[int]]:
        """Draw until every sequence has ended; returns the new ids of each."""
        every = 1 if on_token else READ_EVERY.get(self.device.type, 1)
        still_running = STILL_RUNNING_CAPTURED if self.captured else STILL_RUNNING
        unread: list[Tensor] = []  # [B] each
        done, last = 0, max(self.room)
        while True:
            next_ids = draw(self.logits, self.sampling, self.numbers.next(), self.seen)
            unread.append(next_ids)
            done += 1
            if len(unread) == every or done == last:
                for tokens in torch.stack(unread).tolist():
                    self._take(tokens, on_token)
                unread = []
                if not self.running:
                    return self.outputs
                last = max(self.room[index] for index in self.running)
            if self.seen is not None:
                self.seen.scatter_(1, next_ids[:, None], True)
            if not unread and len(self.running) <= still_running * len(self.indices):
                next_ids = self._drop_ended(next_ids)
            self.logits = self._possible(self._step(next_ids[:, None])[:, -1])

    def _possible(self, logits: Tensor) -> Tensor:
        """Those of `logits` [B, V] that can be drawn, -inf for what is never; `logits` is nobody else's."""
        logits = logits[:, : self.entries]
        return logits.index_fill_(1, self.never, float("-inf")) if len(self.never) else logits

    def _step(self, input_ids: Tensor) -> Tensor:
        return self.captured(input_ids) if self.captured else self.model.step(input_ids, self.state)

    def _take(self, tokens: list[int], on_token: Callable[[int, int], None] | None) -> None:
        """One token a row, as text of those that still run."""
        for index, token in zip(self.indices, tokens, strict=True):
            if index not in self.running:
                continue
            if token in self.stop_ids:
                self.running.remove(index)
                continue
            self.outputs[index].append(token)
            if len(self.outputs[index]) == self.room[index]:
                self.running.remove(index)
            if on_token:
                on_token(index, token)

    def _drop_ended(self, next_ids: Tensor) -> Tensor:
        """Go on without the rows that have ended; returns `next_ids` of the others."""
        rows = [row for row, index in enumerate(self.indices) if index in self.running]
        self.indices = [self.indices[row] for row in rows]
        self.numbers.keep(rows)
        kept = torch.tensor(rows, device=self.device)
        self.state.keep(kept)
        if self.captured and not self.captured.failed:
            self.captured = captured.CapturedSteps(self.model, self.state)  # of the tensors that there are now
        self.seen = None if self.seen is None else self.seen[kept]
        return next_ids[kept]

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        seen = torch.zeros_like(self.logits, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(list(prompt), device=self.device)] = True
        return seen
