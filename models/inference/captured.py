"""Decoding steps as CUDA graphs: the hundreds of small operations of one token, recorded once and started together.

In a batch of some dozens of sequences, a GPU computes an operation of one token faster than Python can ask for the next
one. A graph asks for all of them at once. It works on the very tensors that it was recorded with: the ids and the
length lie in tensors that are overwritten for each token, and attention looks at as many entries as the next multiple
of SPAN, with what is not yet filled masked; each multiple has a graph of its own. Caches and rotary tables grow only
where a graph is recorded anew.

Each recording is compared with the plain step on the token at which it was made, and not used if it differs.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.state import State

SPAN = 256  # entries: fewer cost more recordings, more of them more reading
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the logits' norm
TOLERANCE_ELSE = 0.1  # in 16 bits other kernels round otherwise, in every layer; logits of a wrong cache share nothing


def available(device: torch.device) -> bool:
    """Whether there are graphs on `device`."""
    return device.type == "cuda"


def as_cuda_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step`, recorded: what is returned does the same with the same tensors, and returns the same tensor each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # outside of a recording first: libraries allocate at their first call
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class CapturedSteps:
    """`model.step` of one token a sequence of `state`, by graphs; where they cannot be had, as it is.

    Attributes:
        failed: why there are no graphs, None as long as there are.
    """

    def __init__(self, model: nn.Module, state: State):
        self.model, self.state = model, state
        device = model.embedding.weight.device
        self.failed: str | None = None
        self._ids = torch.zeros(state.batch, 1, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._span = 0
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, 1, V] after `input_ids` [B, 1], valid until the next call."""
        if self.failed:
            return self.model.step(input_ids, self.state)
        self.state.refuse(1)
        self._ids.copy_(input_ids)
        self._place.fill_(self.state.length)
        span = -(-(self.state.length + 1) // SPAN) * SPAN
        if span != self._span:
            return self._recorded(span)
        logits = self._replay()
        self.state.advance(1)
        return logits

    def _recorded(self, span: int) -> Tensor:
        """The logits of the plain step, which the new graph has to give too."""
        self._span, self._replay = span, None  # the last graph's memory is free before the next one asks for some
        self.state.hold(span)  # so that the caches stay where they are for as long as this graph is used
        try:
            self._replay = as_cuda_graph(self._fixed_step)
            found = self._replay().clone()
        except RuntimeError as error:  # whatever cannot be recorded, and no memory to do so
            self._give_up(str(error).strip().splitlines()[0])
            found = None
        expected = self.model.step(self._ids, self.state)  # last, so that what the cache now holds is its own
        if found is not None:
            error = float((found.double() - expected.double()).norm() / expected.double().norm())
            if not error <= TOLERANCE.get(expected.dtype, TOLERANCE_ELSE):
                self._give_up(f"its logits are off by {error:.1%}")
        return expected

    def _fixed_step(self) -> Tensor:
        """The step whose operations are the same for every token of a span; `state` does not count it."""
        state, length = self.state, self.state.length
        state.place, state.span = self._place, self._span
        try:
            return self.model.step(self._ids, state)
        finally:
            state.length, state.place, state.span = length, None, 0

    def _give_up(self, reason: str) -> None:
        self.failed, self._replay = reason, None
        warnings.warn(f"decoding goes on without CUDA graphs, slower: {reason}", stacklevel=2)
