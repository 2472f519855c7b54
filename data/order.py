"""The order in which samples come, as pure functions of (seed, index): nothing to store, nothing to replay.

A permutation of n rows is a keyed Feistel network walked until it lands inside n (Black & Rogaway 2002), so any
position of any epoch costs the same. A mixture of sources is a fixed interleaving pattern, so how often each source
came before sample j is a table look-up.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

PERIOD = 1000  # samples after which a mixture's pattern repeats
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of some integers (splitmix64 finaliser over a running sum)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + value * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(key, round_number, right) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Which source sample j comes from, and the how-manieth of that source it is, for any j at once."""

    names: Sequence[str]
    pattern: np.ndarray  # [period] int64, index into names
    ordinal: np.ndarray  # [period] int64, how often that source came before within the period
    counts: np.ndarray  # [sources] int64, how often each source comes in a period

    @staticmethod
    def of(weights: Mapping[str, float], period: int = PERIOD) -> "Mixture":
        """The pattern of `period` samples closest to `weights` (any scale), evenly interleaved."""
        names = sorted(weights)
        shares = np.array([weights[name] for name in names], dtype=np.float64)
        ideal = shares / shares.sum() * period
        counts = np.floor(ideal).astype(np.int64)
        for index in np.argsort(counts - ideal, kind="stable")[: period - counts.sum()]:
            counts[index] += 1  # largest remainders first
        slots = [((k + 0.5) / count, source, k) for source, count in enumerate(counts.tolist()) for k in range(count)]
        slots.sort()
        pattern = np.array([source for _, source, _ in slots], dtype=np.int64)
        ordinal = np.array([k for _, _, k in slots], dtype=np.int64)
        return Mixture(names, pattern, ordinal, counts)

    def locate(self, sample: int) -> tuple[str, int]:
        """(source name, index within that source's own endless sequence) of sample `sample`."""
        cycle, slot = divmod(sample, len(self.pattern))
        source = int(self.pattern[slot])
        return self.names[source], cycle * int(self.counts[source]) + int(self.ordinal[slot])
