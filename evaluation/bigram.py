"""The floor: an interpolated Kneser-Ney bigram model's loss on the same text with the same tokenizer.

A trained model that does not clear it has learned next to nothing. Counting is done on sorted pair codes, so a few
million tokens take about a second.
"""

from collections.abc import Sequence

import numpy as np

DISCOUNT = 0.75


def kneser_ney_loss(train: Sequence[np.ndarray], valid: np.ndarray, vocab_size: int) -> float:
    """Mean negative log-likelihood of valid[1:] given valid[:-1], in nats a token.

    P(b|a) = max(c(a,b) - D, 0) / c(a) + D n1(a) / c(a) Pc(b), where n1(a) counts distinct successors of a and Pc(b)
    is b's share of distinct pairs (Kneser & Ney 1995); a token never seen counts as half a pair.

    Args:
        train: streams of token ids, each document followed by its end-of-text token; valid: one such stream.
    """
    codes = [stream[:-1].astype(np.int64) * vocab_size + stream[1:] for stream in train if len(stream) > 1]
    pairs, counts = np.unique(np.concatenate(codes), return_counts=True)
    left, right = pairs // vocab_size, pairs % vocab_size
    left_total = np.bincount(left, weights=counts, minlength=vocab_size)
    successors = np.bincount(left, minlength=vocab_size)
    continuation = np.bincount(right, minlength=vocab_size) + 0.5
    continuation = continuation / continuation.sum()
    given, next_token = valid[:-1].astype(np.int64), valid[1:].astype(np.int64)
    wanted = given * vocab_size + next_token
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    unknown_left = left_total[given] == 0
    total = np.where(unknown_left, 1, left_total[given])
    interpolated = np.maximum(seen - DISCOUNT, 0) + DISCOUNT * successors[given] * continuation[next_token]
    probability = np.where(unknown_left, continuation[next_token], interpolated / total)
    return float(-np.log(probability).mean())
