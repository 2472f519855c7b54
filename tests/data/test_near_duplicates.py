"""Near-duplicates are those that brute force finds, and the index finds them on disk."""

import itertools
import json
import random
import sqlite3
import string
from collections import Counter
from collections.abc import Callable

import numpy
import pytest

from data.preparation import near_duplicates
from data.preparation.near_duplicates import Index, bands, shingles, similarity
from data.preparation.words import words_of

WORDS = ["".join(letters) for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=3), 2000)]
CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))


def texts_alike(count: int, seed: int) -> list[str]:
    """Documents, some of which are edited copies of others, from nearly equal to half new."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        if found and draw.random() < 0.5:
            words = draw.choice(found).split()
            for _ in range(draw.randrange(1, 25)):
                words[draw.randrange(len(words))] = draw.choice(WORDS)
        else:
            words = draw.choices(WORDS, k=draw.randrange(40, 200))
        found.append(" ".join(words))
    return found


def brute_force(texts: list[str], threshold: float, words_of: Callable[[str], list[str]] = words_of) -> list[bool]:
    """Whether each document is like an earlier one that stays: every pair, sets of words, nothing hashed."""
    kept: list[set] = []
    flags = []
    for text in texts:
        words = words_of(text.lower())
        own = {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}
        flags.append(any(not own.isdisjoint(other) and len(own & other) >= threshold * len(own | other)
                         for other in kept))  # fmt: skip
        if not flags[-1]:
            kept.append(own)
    return flags


def found_by_index(texts: list[str], threshold: float) -> list[bool]:
    index = Index(sqlite3.connect(":memory:"), threshold)
    sets = shingles(texts)
    return [not index.add(*pair) for pair in zip(bands(sets), sets, strict=True)]


def assert_agree(ours: list[bool], theirs: list[bool]):
    true = sum(a and b for a, b in zip(ours, theirs, strict=True))
    assert true >= 0.98 * sum(ours) and true >= 0.98 * sum(theirs)
    assert 0 < true < len(ours)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_edited_copies_are_found_as_by_brute_force(threshold):
    texts = texts_alike(600, seed=int(100 * threshold))
    assert_agree(found_by_index(texts, threshold), brute_force(texts, threshold))


def test_real_stories_and_chapters_are_found_as_by_brute_force(real_data):
    """2,000 documents as they are, with a threshold at which real text has something to find."""
    texts = []
    for name in ("tinystories/train.jsonl", "chat/dolly_15k.jsonl"):
        with open(real_data / name, encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(1000), file, strict=False)]
        texts += [row.get("text") or row["instruction"] + " " + row["response"] for row in rows]
    texts += [texts[7] + " The end.", texts[1500].upper()]
    ours, theirs = found_by_index(texts, 0.7), brute_force(texts, 0.7)
    assert ours[-2:] == [True, True]
    assert_agree(ours, theirs)


def test_shingles_are_the_words_of_five_in_any_case_and_spacing():
    one, other, short, same = shingles(["A b c d e f", "a  B\nc, d e. F", "a b", "b a"])
    assert numpy.array_equal(one, other) and len(one) == 2
    assert len(short) == 1 and not numpy.array_equal(short, same)
    assert similarity(one, other) == 1 and similarity(one, short) == 0


def test_bands_do_not_depend_on_what_else_is_hashed():
    sets = shingles(texts_alike(50, seed=3))
    together = bands(sets)
    assert together.shape == (50, near_duplicates.BANDS)
    assert all(numpy.array_equal(bands([own])[0], row) for own, row in zip(sets, together, strict=True))
    assert bands([]).shape == (0, near_duplicates.BANDS)


def test_texts_without_a_word_are_alike_only_if_they_are_the_same():
    assert found_by_index(["!!! ???", "((( )))", "!!! ???", "\n* * *"], 0.8) == [False, False, True, False]


def test_in_scripts_without_spaces_a_copy_with_another_letter_is_found():
    draw = random.Random(5)
    one, other = ("".join(draw.choices(CHINESE, k=300)) for _ in range(2))
    edited = one[:100] + "。" + other[0] + one[101:]
    assert found_by_index([one, other, edited], 0.8) == [False, False, True]


def test_a_page_that_all_documents_share_costs_no_more_than_the_few_that_are_compared(monkeypatch):
    """And copies among them are found all the same."""
    compared = Counter()
    monkeypatch.setattr(near_duplicates, "BAND_ROOM", 20)
    monkeypatch.setattr(near_duplicates, "COMPARED", 10)
    monkeypatch.setattr(near_duplicates, "similarity",
                        lambda one, other: compared.update([other.tobytes()]) or similarity(one, other))  # fmt: skip
    draw = random.Random(6)
    page = " ".join(draw.choices(WORDS, k=150))
    texts = [f"{page} {text}" for text in texts_alike(300, seed=6)]
    ours = found_by_index(texts, 0.8)
    assert max(compared.values()) <= 10 and sum(compared.values()) > 500
    assert_agree(ours, brute_force(texts, 0.8))
