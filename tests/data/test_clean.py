"""Normalisation has one result for each text, and a document's hash alone decides its side."""

import random
import unicodedata

import pytest

from data.preparation import clean

TRICKY = ["e", "\u0301", "\r", "\n", "\t", " ", "\u3000", "\0", "\x1c", "\x7f", "\x85", "\x9f", "\ufeff", "\u1100", "\u1161", "가", "ﬁ", "😀", "a\u0323\u0307"]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("one\r\ntwo\rthree\n", "one\ntwo\nthree"),
        ("  kept\n\n\tkept  \n\t \n", "  kept\n\n\tkept"),
        ("a\0b\x1bc\x7fd\x85e\ufefff", "abcde\ufefff"),
        ("e\0\u0301", "\u00e9"),
        (" \n\0\r\n", ""),
        ("\ufb01", "\ufb01"),  # a ligature stays: NFC, not NFKC
    ],
)
def test_normalise(raw, normal):
    assert clean.normalise(raw) == normal


def test_normalising_twice_changes_nothing_and_leaves_no_control_character():
    draw = random.Random(3)
    for _ in range(3000):
        once = clean.normalise("".join(draw.choices(TRICKY, k=draw.randrange(12))))
        assert clean.normalise(once) == once
        assert unicodedata.is_normalized("NFC", once)
        assert not [c for c in once if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_keys_are_16_bytes_and_fixed_forever():
    assert clean.key_of("Once upon a time").hex() == "041b76e5564c0ea1bdb7e4cb77fae791"
    assert clean.key_of("a") != clean.key_of("A")


def test_the_split_is_a_fixed_share_and_a_larger_share_contains_a_smaller():
    texts = [f"document {number}" for number in range(5000)]
    held_out = {share: {t for t in texts if clean.split_of(t, share) == "valid"} for share in (0.0, 0.02, 0.1, 0.5)}
    assert held_out[0.0] == set()
    assert held_out[0.02] < held_out[0.1] < held_out[0.5]
    for share, side in held_out.items():
        assert abs(len(side) / len(texts) - share) < 0.02
