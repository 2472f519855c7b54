"""Packing loses no token and no position to speak of, and cuts far fewer documents than cutting a stream would."""

import json

import numpy as np
import pytest

from data.packing import PackingPlan, _best_fit_decreasing, pack

GENERATOR = {
    "stories": lambda random, n: random.gamma(6, 35, n) + 20,  # about 230 tokens, as TinyStories
    "mixed": lambda random, n: np.exp(random.normal(5.3, 1.1, n)),
    "long": lambda random, n: np.exp(random.normal(9, 0.8, n)),  # about 11,000
    "tiny": lambda random, n: random.integers(2, 8, n),
    "one story too long for a row": lambda random, n: np.full(n, 257),
    "two thirds": lambda random, n: np.full(n, 171),
    "just over a half": lambda random, n: np.full(n, 129),
}


def lengths_of(kind: str, documents: int, seed: int = 0) -> np.ndarray:
    """[documents] int64, at least 2: a token and the end of text."""
    return np.maximum(GENERATOR[kind](np.random.default_rng(seed), documents).astype(np.int64), 2)


def check(plan: PackingPlan, lengths: np.ndarray, context: int) -> None:
    """Every token of every document is in one piece of one row, and no row holds more than `context`."""
    assert plan.row_starts[0] == 0 and plan.row_starts[-1] == len(plan.document)
    pieces_a_row = np.diff(plan.row_starts)
    assert (pieces_a_row > 0).all() and (plan.length > 0).all()
    rows = np.repeat(np.arange(len(plan)), pieces_a_row)
    assert np.bincount(rows, plan.length, len(plan)).max(initial=0) <= context
    starts = np.cumsum([0, *lengths])
    placed = np.zeros(starts[-1], dtype=np.int64)
    for document, offset, length in zip(plan.document, plan.offset, plan.length, strict=True):
        assert offset + length <= lengths[document]
        placed[starts[document] + offset : starts[document] + offset + length] += 1
    assert (placed == 1).all()


def cut_documents(plan: PackingPlan, lengths: np.ndarray, context: int) -> int:
    """Documents in more pieces than their length asks for."""
    return int((np.bincount(plan.document, minlength=len(lengths)) > -(-lengths // context)).sum())


def cut_by_a_stream(lengths: np.ndarray, context: int) -> int:
    """The same, were all documents joined and cut every `context` tokens."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    return int(((ends - 1) // context - starts // context + 1 > -(-lengths // context)).sum())


@pytest.mark.parametrize("context", [64, 256, 1024, 2048])
@pytest.mark.parametrize(
    ("kind", "documents"),
    [("stories", 5000), ("mixed", 2000), ("long", 60), ("tiny", 50_000), ("one story too long for a row", 2000),
     ("two thirds", 2000), ("just over a half", 2000)],
)  # fmt: skip
def test_every_token_once_and_under_two_in_a_hundred_positions_wasted(kind, documents, context):
    lengths = lengths_of(kind, documents)
    plan = pack(lengths, context)
    check(plan, lengths, context)
    assert plan.waste < 0.02
    assert plan.waste == pytest.approx(1 - lengths.sum() / (len(plan) * context))


@pytest.mark.parametrize(
    ("kind", "documents", "context", "share"),
    [("stories", 5000, 256, 0.15), ("stories", 5000, 1024, 0.1), ("stories", 5000, 2048, 0.1),
     ("mixed", 2000, 256, 0.02), ("mixed", 2000, 1024, 0.02), ("long", 100, 1024, 0.1), ("tiny", 50_000, 256, 0.02),
     ("two thirds", 2000, 256, 0.6)],  # no two fit into a row, so that every other document has to be cut
)  # fmt: skip
def test_few_documents_are_cut(kind, documents, context, share):
    lengths = lengths_of(kind, documents)
    by_a_stream = cut_by_a_stream(lengths, context)
    assert by_a_stream > 10
    assert cut_documents(pack(lengths, context), lengths, context) <= share * by_a_stream


def test_documents_that_fit_exactly_are_never_cut():
    lengths = np.array([256, 128, 128, 64, 192, 512, 1] * 40)
    plan = pack(lengths, 256)
    check(plan, lengths, 256)
    assert cut_documents(plan, lengths, 256) == 0
    assert len(plan) == -(-int(lengths.sum()) // 256)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_lengths_no_token_is_lost(seed):
    random = np.random.default_rng(seed)
    context = int(random.integers(2, 80))
    lengths = random.integers(1, random.integers(2, 4 * context), random.integers(0, 80))
    plan = pack(lengths, context)
    check(plan, lengths, context)
    smallest_gap = max(1, context // 64)
    most = lengths.sum() / (context - smallest_gap + 1) + 1  # every row has at most such a gap, but the last
    assert len(plan) <= most + 1


def one_at_a_time(lengths: np.ndarray, context: int) -> list[int]:
    """The row of each piece, by the definition: the row that it leaves the least room in, of equal ones the row that
    came to have this room last, else a new one."""
    free: list[int] = []  # of each row
    since: list[int] = []  # when each row came to have it
    rows = []
    for now, length in enumerate(lengths.tolist()):
        fitting = [row for row in range(len(free)) if free[row] >= length]
        if not fitting:
            free.append(context)
            since.append(now)
        row = min(fitting, key=lambda row: (free[row], -since[row])) if fitting else len(free) - 1
        free[row] -= length
        since[row] = now
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_pieces_of_equal_length_placed_together_are_where_they_would_be_one_at_a_time(seed):
    random = np.random.default_rng(seed)
    context = int(random.integers(1, 60))
    lengths = -np.sort(-random.integers(1, min(context, 1 + seed) + 1, random.integers(0, 200)))
    assert _best_fit_decreasing(lengths, context).tolist() == one_at_a_time(lengths, context)


def test_nothing_and_next_to_nothing():
    assert len(pack(np.zeros(0, dtype=np.int64), 64)) == 0
    assert pack(np.zeros(0, dtype=np.int64), 64).waste == 1
    for lengths in [1], [64], [65], [1, 1], [63, 2]:
        plan = pack(np.array(lengths), 64)
        check(plan, np.array(lengths), 64)
        assert len(plan) == -(-sum(lengths) // 64)


def test_a_plan_is_a_function_of_the_lengths():
    lengths = lengths_of("mixed", 500)
    first, second = pack(lengths, 256), pack(lengths.copy(), 256)
    for name in "row_starts", "document", "offset", "length":
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == np.int64


def test_real_stories(real_data):
    with open(real_data / "tinystories" / "valid.jsonl", encoding="utf-8") as file:
        lengths = np.array([len(json.loads(line)["text"].encode()) // 4 + 1 for line in file])
    for context, share in (256, 0.4), (1024, 0.15), (2048, 0.1):  # hardly two of these stories fit into 256
        plan = pack(lengths, context)
        check(plan, lengths, context)
        assert plan.waste < 0.02
        assert cut_documents(plan, lengths, context) < share * cut_by_a_stream(lengths, context)
