"""Dropout whose masks are a function of (seed, sample, place), so that no rank's random stream decides what is dropped.

A sample loses the same activations whichever rank trains it, in whichever micro-batch, before or after a resume, and
again when its block is recomputed. Each element's number is hashed with its sample's seed (lowbias32, Wellons 2018).
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Dropout:
    """The masks of one forward pass (Srivastava et al. 2014).

    Args:
        seeds: [B] int64, one a sample.
        rate: share of elements that become 0; the others are scaled up so that the mean stays.
        first: scalar int32, the place from which this part of the model counts its dropouts. A tensor, because what is
            compiled for one layer would not fit another's number.
    """

    seeds: Tensor
    rate: float
    first: Tensor

    @staticmethod
    def of(seeds: Tensor, rate: float, first: int = 0) -> "Dropout":
        """For the part of the model whose dropouts are the places from `first` on."""
        return Dropout(seeds, rate, torch.full((), first, dtype=torch.int32, device=seeds.device))

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """`x` [B, ...] with elements dropped; `place`, from 0, tells the dropouts of one part apart."""
        return x * (self.kept(x.shape, place).to(x.dtype) / (1 - self.rate))

    def kept(self, shape: torch.Size, place: int) -> Tensor:
        """[shape] bool, False where an element is dropped."""
        low, high = self.seeds.to(torch.int32), (self.seeds >> 32).to(torch.int32)  # conversion keeps the low bits
        # one hash after the other, so that no two places trade roles
        keys = _hash(_hash(_hash(low + 0x3C6EF372) ^ high) + (self.first + place))
        elements = torch.arange(shape[1:].numel(), dtype=torch.int32, device=self.seeds.device)
        threshold = int(self.rate * 2**32) - 2**31  # a hash is even over all int32
        return (_hash(elements[None] ^ keys[:, None]) >= threshold).view(shape)


def _hash(x: Tensor) -> Tensor:
    """lowbias32 of int32: every bit of the result depends on every bit of `x`. Products wrap around."""
    x = x ^ (x >> 16 & 0xFFFF)  # >> copies the sign; the mask makes it the logical shift that is meant
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)
