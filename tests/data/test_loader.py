"""Samples are a function of (seed, index): the same for any number of ranks, from any cursor, each row once an epoch.

Most shards here are made up so that a token tells where it is from: token number p of document d is d * STRIDE + p.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import settings
from data import embedded, shards
from data.loader import Batch, PackedRows, PhaseLoader, Row, validation_batches
from data.prepare import Config, prepare
from data.token_shards import TokenShards
from models.kernels.ignored import IGNORE
from tokenizer import Tokenizer

END, STRIDE = 0, 4096
SIZES = {  # tokens of each document, its end of text included
    "short": [2, 3, 5, 8, 13, 21, 34] * 3,
    "long": [700, 33, 64, 65, 130, 1],
}


def write_shards(folder: Path, train: list[int], valid: list[int] = (), shard_tokens: int = 100) -> Path:
    folder.mkdir(parents=True)
    part = folder / "part"
    part.mkdir()
    dtype = shards.token_dtype(2**20)
    counts = {}
    for split, sizes in ("train", train), ("valid", valid):
        writer = shards.SplitWriter(part, split, dtype, END)
        for document, size in enumerate(sizes, 1):
            writer.write("", [document * STRIDE + place for place in range(size - 1)])
        counts[split] = writer.close()
    (part / shards.DESCRIPTION).write_text(json.dumps({"splits": counts}))
    splits = {split: shards.join([part], folder, split, dtype, shard_tokens) for split in shards.SPLITS}
    about = {"splits": splits, "end_of_text": END, "dtype": dtype.name}
    (folder / shards.DESCRIPTION).write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    return {name: write_shards(root / name, sizes, sizes[::-1]) for name, sizes in SIZES.items()}


def loader(sources, weights=None, **options) -> PhaseLoader:
    defaults = {"context": 64, "seed": 5, "phase": 0, "batch_rows": 7, "micro_rows": 3}
    return PhaseLoader(sources, weights or {"short": 0.4, "long": 0.6}, **{**defaults, **options})


def rows_of(batches: list[Batch]) -> dict[int, tuple[bytes, ...]]:
    """Content of each row by sample id, without the rows that only fill up."""
    found = {}
    for batch in batches:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            if sample >= 0:
                assert sample not in found
                parts = (batch.input_ids, batch.labels, batch.document_ids)
                found[sample] = tuple(part[row].numpy().tobytes() for part in parts)
    return found


def arrays_of(row: Row) -> tuple[np.ndarray, ...]:
    assert row.teacher_ids is None and row.teacher_logprobs is None
    return row.input_ids, row.labels, row.document_ids


def pieces(row: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, labels) of each document in a row."""
    inputs, labels, documents = arrays_of(row)
    numbers = sorted(set(documents.tolist()) - {0})
    assert numbers == list(range(1, len(numbers) + 1))
    assert (np.diff(documents[documents > 0]) >= 0).all()  # one run of ids a document
    assert ((labels == IGNORE) == (documents == 0)).all()
    assert (documents[: (documents > 0).sum()] > 0).all()  # what is left over is at the end
    assert (inputs[documents == 0] == END).all()
    return [(inputs[documents == number], labels[documents == number]) for number in numbers]


def origin(labels: np.ndarray, sizes: list[int]) -> set[tuple[int, int]]:
    """(document, place) of each label of a piece, after checking that they follow one another."""
    if labels[0] == END:  # a piece that is only an end of text: of which document, its label cannot tell
        assert len(labels) == 1
        return {(-1, -1)}
    document, first = divmod(int(labels[0]), STRIDE)
    size = sizes[document - 1]
    expected = [document * STRIDE + place if place < size - 1 else END for place in range(first, first + len(labels))]
    assert first + len(labels) <= size and labels.tolist() == expected
    return {(document, first + number) for number in range(len(labels))}


# --- rows


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("context", [16, 64, 256])
def test_a_document_is_learned_from_its_first_token_to_its_end(sources, name, context):
    """END t1 .. tn is read and t1 .. tn END is learned; a piece from the middle reads the token before it."""
    sizes = SIZES[name]
    rows = PackedRows(TokenShards(sources[name], "train"), context)
    learned: Counter[tuple[int, int]] = Counter()
    cuts = 0
    for index in range(len(rows)):
        row = rows.row(index)
        assert all(part.shape == (context,) and part.dtype == np.int64 for part in arrays_of(row))
        for inputs, labels in pieces(row):
            places = origin(labels, sizes)
            learned.update(places)
            assert inputs[1:].tolist() == labels[:-1].tolist()
            document, first = min(places)
            if document == -1:
                last_tokens = [number * STRIDE + size - 2 for number, size in enumerate(sizes, 1) if size > 1]
                assert inputs[0] == END or inputs[0] in last_tokens
            elif first == 0:
                assert inputs[0] == END
            else:
                assert inputs[0] == document * STRIDE + first - 1
                cuts += 1
    lone_ends = learned.pop((-1, -1), 0)
    everything = {(document, place) for document, size in enumerate(sizes, 1) for place in range(size)}
    assert set(learned) <= everything and len(everything) - len(learned) == lone_ends
    assert set(learned.values()) == {1}
    assert cuts > 0 or max(sizes) <= context


def test_many_shards_are_one_split(sources, tmp_path):
    for name, sizes in SIZES.items():
        many = TokenShards(sources[name], "train")
        one = TokenShards(write_shards(tmp_path / name, sizes, shard_tokens=10**6), "train")
        assert len(many.tokens) > 1 and len(one.tokens) == 1
        for document, size in enumerate(sizes):
            for offset in range(0, size, 7):
                for part, same in zip(
                    many.piece(document, offset, size - offset), one.piece(document, offset, size - offset), strict=True
                ):
                    assert part.tolist() == same.tolist()


def test_prepared_text_comes_back_as_it_was(tmp_path):
    """Through preparation into many shards, packing and the loader, every document decodes to its text."""
    sizes = {"stories": 40, "recall": 2}
    raw = {"data": {"sources": {name: {"from": f"embedded:{name}", "documents": n} for name, n in sizes.items()}}}
    raw["data"]["shards"] = str(tmp_path)
    raw["tokenizer"] = {"vocab_size": 1024}
    config = settings.validate(Config, raw)
    prepared = prepare(config.data, config.tokenizer, lambda _: None, shard_tokens=500)
    tokenizer: Tokenizer = prepared.tokenizer
    for name, count in sizes.items():
        assert len(prepared.describe(name)["splits"]["train"]["shards"]) > 1
        options = {"context": 2048, "batch_rows": 1, "micro_rows": 1}
        phase = loader(prepared.sources, {name: 1.0}, **options)
        texts = []
        for sample in range(len(phase.rows[name])):
            for inputs, labels in pieces(phase.sample(sample)):
                if inputs[0] == tokenizer.end_of_text and labels[-1] == tokenizer.end_of_text:
                    texts.append(tokenizer.decode(labels[:-1].tolist()))
        originals = list(embedded.documents(name, "train", count, config.data.seed))
        assert len(texts) >= 0.7 * count and set(texts) <= set(originals)
        phase.close()


# --- samples


@pytest.mark.parametrize(
    "weights", [{"short": 1.0}, {"long": 1.0}, {"short": 0.4, "long": 0.6}, {"short": 9, "long": 1}], ids=str
)
def test_each_row_comes_once_an_epoch_in_another_order(sources, weights):
    phase = loader(sources, weights, context=16)
    rows = {name: {content_of(packed.row(i)): i for i in range(len(packed))} for name, packed in phase.rows.items()}
    assert all(len(distinct) == len(phase.rows[name]) for name, distinct in rows.items())
    seen: dict[str, list[int]] = {name: [] for name in weights}
    for sample in range(4 * max(map(len, rows.values()))):
        content = content_of(phase.sample(sample))
        (name,) = (name for name, distinct in rows.items() if content in distinct)
        seen[name].append(rows[name][content])
    for name, order in seen.items():
        size = len(rows[name])
        epochs = [order[start : start + size] for start in range(0, len(order), size)]
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(size))
        assert len(set(epochs[-1])) == len(epochs[-1])
        if len(epochs) > 2:
            assert epochs[0] != epochs[1] != list(range(size)) != epochs[0]
    assert max(map(len, seen.values())) >= 3 * size_of_smallest(rows)


def content_of(row: Row) -> tuple[bytes, ...]:
    return tuple(part.tobytes() for part in arrays_of(row))


def size_of_smallest(rows: dict) -> int:
    return min(map(len, rows.values()))


def test_the_order_depends_on_seed_and_phase_and_on_nothing_else(sources):
    def first(**options):
        phase = loader(sources, **{"context": 16, **options})
        return [content_of(phase.sample(n)) for n in range(30)]

    assert first() == first(batch_rows=64, micro_rows=1, rank=3, world=4)
    assert len({tuple(order) for order in (first(), first(seed=6), first(phase=1), first(seed=6, phase=1))}) == 4


# --- batches


def steps(sources, count: int, world: int, first: int = 0, **options) -> list[list[Batch]]:
    """The micro-batches of all ranks, one list a step."""
    loaders = [loader(sources, rank=rank, world=world, **options) for rank in range(world)]
    found = []
    for step in range(count):
        cursor = first + step * loaders[0].batch_rows
        of_ranks = [each.step(cursor) for each in loaders]
        assert len({len(batches) for batches in of_ranks}) == 1, "every rank takes part in as many exchanges"
        found.append([batch for batches in of_ranks for batch in batches])
    for each in loaders:
        each.close()
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("micro_rows", [1, 2, 3, 8])
def test_any_number_of_processes_and_any_micro_batch_make_the_same_global_batches(sources, world, micro_rows):
    count = 9  # 63 samples, over several epochs of both sources
    direct = loader(sources)
    assert sum(len(rows) for rows in direct.rows.values()) < 25
    for number, batches in enumerate(steps(sources, count, world, micro_rows=micro_rows)):
        samples = range(7 * number, 7 * number + 7)
        assert rows_of(batches) == {sample: content_of(direct.sample(sample)) for sample in samples}
        shape = batches[0].input_ids.shape
        assert shape[0] <= micro_rows and shape[1] == 64
        for batch in batches:
            assert batch.input_ids.shape == batch.labels.shape == batch.document_ids.shape == shape
            assert batch.sample_ids.shape == shape[:1]
            assert {part.dtype for part in tensors_of(batch).values()} == {torch.int64}
            filling = batch.sample_ids < 0
            assert (batch.labels[filling] == IGNORE).all() and (batch.input_ids[filling] == END).all()
        expected = sum(int((direct.sample(sample).labels != IGNORE).sum()) for sample in samples)
        assert sum(batch.trained_tokens for batch in batches) == expected


def test_work_is_shared_evenly(sources):
    for world in 1, 2, 3, 7:
        shares = [
            sum(int((batch.sample_ids >= 0).sum()) for batch in loader(sources, rank=rank, world=world).step(0))
            for rank in range(world)
        ]
        assert sum(shares) == 7 and max(shares) - min(shares) <= 1


@pytest.mark.parametrize("world", [1, 2])
def test_from_any_cursor_it_goes_on_as_if_it_had_never_stopped(sources, world):
    unbroken = steps(sources, 8, world)
    for step in range(8):
        resumed = steps(sources, 8 - step, world, first=7 * step)
        for ours, theirs in zip(resumed, unbroken[step:], strict=True):
            assert_same(ours, theirs)


def test_another_number_of_processes_goes_on_with_the_same_samples(sources):
    unbroken = [rows_of(batches) for batches in steps(sources, 6, 1)]
    changing = [*steps(sources, 2, 1), *steps(sources, 2, 2, first=14), *steps(sources, 2, 3, first=28)]
    assert [rows_of(batches) for batches in changing] == unbroken


def test_a_far_cursor_is_as_near_as_any(sources):
    far = 10**12
    assert list(rows_of(loader(sources).step(far))) == list(range(far, far + 7))


def test_fetching_ahead_changes_nothing(sources):
    direct = [loader(sources)._assemble(7 * number) for number in range(6)]
    ahead = loader(sources)
    for number in (0, 1, 2, 2, 5, 3, 4, 0):  # also where it is not the next that is asked for
        assert_same(ahead.step(7 * number), direct[number])
    ahead.close()


def test_what_fails_while_fetching_ahead_is_not_lost(sources, monkeypatch):
    phase = loader(sources)
    phase.step(0)
    phase._next[1].result()
    monkeypatch.setattr(phase, "sample", lambda index: 1 / 0)
    phase.step(7)
    with pytest.raises(ZeroDivisionError):
        phase.step(14)
    phase.close()


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in tensors_of(one).keys() | tensors_of(other).keys():
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: part for name, part in vars(batch).items() if part is not None}


def test_a_batch_moves_whole(sources):
    (batch, *_) = loader(sources).step(0)
    moved = batch.to(torch.device("meta"))
    assert {part.device.type for part in tensors_of(moved).values()} == {"meta"}
    assert tensors_of(moved).keys() == tensors_of(batch).keys()


def test_a_source_without_training_documents_is_named(sources, tmp_path):
    empty = write_shards(tmp_path / "empty", [], [5])
    with pytest.raises(ValueError, match="data.sources.empty"):
        loader({**sources, "empty": empty}, {"short": 0.5, "empty": 0.5})


# --- validation


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_every_rank_takes_its_share_of_the_whole_validation_split(sources, name, rows):
    packed = PackedRows(TokenShards(sources[name], "valid"), 32)
    whole = {index: content_of(packed.row(index)) for index in range(len(packed))}
    for world in 1, 2, 3, 5:
        of_ranks = [list(validation_batches(sources[name], 32, rows, None, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in of_ranks}) == 1
        assert rows_of([batch for batches in of_ranks for batch in batches]) == whole
        assert {batch.input_ids.shape for batches in of_ranks for batch in batches} == {(rows, 32)}
        tokens = sum(batch.trained_tokens for batches in of_ranks for batch in batches)
        assert tokens == sum(SIZES[name])


@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (31, 1), (64, 2), (100, 3), (10**9, None)])
def test_validation_stops_after_so_many_positions_over_all_ranks(sources, limit, rows):
    rows = len(PackedRows(TokenShards(sources["long"], "valid"), 32)) if rows is None else rows
    for world in 1, 2, 3:
        of_ranks = [list(validation_batches(sources["long"], 32, 2, limit, rank, world)) for rank in range(world)]
        assert sorted(rows_of([batch for batches in of_ranks for batch in batches])) == list(range(rows))
        assert len({len(batches) for batches in of_ranks}) == 1


def test_validation_of_nothing(tmp_path):
    assert list(validation_batches(write_shards(tmp_path / "x", [5]), 32, 4, None, 0, 1)) == []
