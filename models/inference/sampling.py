"""How a next token is chosen, as plain values: read by command lines and configs, so it does not import torch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is drawn; temperature 0 takes the likeliest. The repetition penalty comes first, then the
    temperature, then the filters in the order of the fields."""

    temperature: float = 0.8
    top_k: int | None = None  # keep the k likeliest
    top_p: float | None = None  # keep the likeliest that together have this probability (Holtzman et al. 2020)
    min_p: float | None = None  # keep those at least this share as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divide (or multiply, below 0) logits of tokens already there (Keskar et al. 2019)
    seed: int = 0

    def problems(self) -> list[tuple[str, object, str]]:
        """(name, value, what would be right) for everything out of range."""
        rules = [
            ("temperature", self.temperature == 0 or self.temperature >= 1e-3, "use 0 (greedy), or 0.001 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "use 1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "use a number above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "use a number from 0 to 1"),
            ("seed", -(2**63) <= self.seed < 2**63 - 2**20, "use a 64-bit integer"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "use 0.001 to 1000 (1 is no penalty)"),
        ]
        return [(name, getattr(self, name), remedy) for name, right, remedy in rules if not right]
