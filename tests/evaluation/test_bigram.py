"""The Kneser-Ney floor against a dictionary implementation of its formula."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from evaluation.bigram import DISCOUNT, kneser_ney_loss

VOCABULARY = 30


def probability_by_definition(train, given, token):
    """P(token | given) after the token streams `train`, with dictionaries and loops."""
    pairs = Counter(pair for stream in train for pair in zip(stream[:-1], stream[1:], strict=True))
    successors, predecessors = defaultdict(set), defaultdict(set)
    for left, right in pairs:
        successors[left].add(right)
        predecessors[right].add(left)
    share = {token: len(predecessors[token]) + 0.5 for token in range(VOCABULARY)}
    continuation = share[token] / sum(share.values())
    total = sum(pairs[given, right] for right in range(VOCABULARY))
    if total == 0:
        return continuation
    kept = max(pairs[given, token] - DISCOUNT, 0) / total
    return kept + DISCOUNT * len(successors[given]) / total * continuation


def streams(*sizes, used=20, seed=0):
    """Token streams with a few frequent pairs; tokens from `used` on never occur."""
    generator = np.random.default_rng(seed)
    return [np.minimum(generator.geometric(0.2, size) - 1, used - 1).astype(np.uint16) for size in sizes]


def expected_loss(train, valid):
    train = [stream.tolist() for stream in train]
    pairs = zip(valid[:-1].tolist(), valid[1:].tolist(), strict=True)
    logs = [math.log(probability_by_definition(train, given, token)) for given, token in pairs]
    return -sum(logs) / len(logs)


@pytest.mark.parametrize("sizes", [(400,), (300, 1, 90), (2,), (0, 50)])
def test_loss_equals_the_formula_with_seen_and_unseen_tokens(sizes):
    train = streams(*sizes)
    (valid,) = streams(120, used=25, seed=1)
    valid = np.concatenate([valid, np.array([29, 29, 0, 29, 0], dtype=np.uint16)])  # 29 occurs nowhere else
    assert kneser_ney_loss(train, valid, VOCABULARY) == pytest.approx(expected_loss(train, valid), rel=1e-12)


def test_probabilities_of_all_next_tokens_sum_to_one():
    """After a frequent token, a rare one and one never seen."""
    train = streams(400)
    for given in (0, 17, 28):
        total = sum(
            math.exp(-kneser_ney_loss(train, np.array([given, token]), VOCABULARY)) for token in range(VOCABULARY)
        )
        assert total == pytest.approx(1, rel=1e-9)


def test_pairs_across_two_streams_do_not_count():
    apart = kneser_ney_loss([np.array([1, 2, 1, 2]), np.array([3, 4, 3, 4])], np.array([2, 3]), VOCABULARY)
    joined = kneser_ney_loss([np.array([1, 2, 1, 2, 3, 4, 3, 4])], np.array([2, 3]), VOCABULARY)
    assert joined < apart - 0.5


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_a_large_vocabulary_does_not_overflow_the_shards_dtype(dtype):
    train = np.array([50000, 49999] * 20 + [1, 50000], dtype=dtype)
    valid = np.array([50000, 49999, 50000], dtype=dtype)
    assert kneser_ney_loss([train], valid, 50257) < 0.1


def test_text_like_the_training_text_is_easier_than_chance():
    train, (valid,) = streams(20000), streams(2000, seed=3)
    counts = np.bincount(train[0], minlength=VOCABULARY) / len(train[0])
    entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    assert kneser_ney_loss(train, valid, VOCABULARY) == pytest.approx(entropy, rel=0.03)
