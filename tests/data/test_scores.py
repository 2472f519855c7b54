"""A teacher's scores beside shards: each trained token of a row has its own, wherever packing has put it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data import scores, shards
from data.loader import IGNORE, PackedRows, PhaseLoader, validation_batches
from data.scores import UNSCORED, Scores
from data.sources import SourceError
from data.token_shards import TokenShards
from storage import folder

END, STRIDE, K = 0, 1000, 3
SIZES = [2, 3, 150, 8, 13, 1, 34, 64, 65, 21]


def write_source(path: Path, masked: bool, shard_tokens: int = 120) -> Path:
    """Documents of SIZES tokens, in several shards; of masked ones every third token and the first is trained."""
    part = path.with_name(f"{path.name}-part")
    part.mkdir(parents=True)
    dtype, counts = shards.token_dtype(70_000), {}
    for split in shards.SPLITS:
        writer = shards.SplitWriter(part, split, dtype, END, masked)
        for document, size in enumerate(SIZES, 1):
            tokens = [document * STRIDE + place for place in range(size - 1)]
            if masked:
                writer.write_conversation("", tokens, [int(place % 3 == 0) for place in range(size - 1)], "")
            else:
                writer.write("", tokens)
        counts[split] = writer.close()
    (part / shards.DESCRIPTION).write_text(json.dumps({"splits": counts}))
    with folder.write(path) as temporary:
        splits = {split: shards.join([part], temporary, split, dtype, shard_tokens) for split in shards.SPLITS}
        if masked:
            for split in shards.SPLITS:
                splits[split]["trained_tokens"] = counts[split]["trained_tokens"]
        about = {"name": path.name, "splits": splits, "end_of_text": END, "dtype": dtype.name}
        (temporary / shards.DESCRIPTION).write_text(json.dumps(about))
    return path


def write_scores(path: Path, source: Path, k: int = K, digest: str = "0ff") -> Path:
    """Of each trained token, in order: itself and the next ids, and log-probabilities made of its place."""
    with folder.write(path) as temporary:
        splits = {}
        for split in shards.SPLITS:
            tokens = TokenShards(source, split)
            for number, stem in enumerate(tokens.about["shards"]):
                trained = np.asarray(tokens.tokens[number])
                if tokens.masks is not None:
                    trained = trained[tokens.masks[number] != 0]
                ids = trained[:, None].astype(np.int64) + np.arange(k)
                ids.astype(trained.dtype).tofile(temporary / f"{stem}{scores.IDS}")
                (-(ids % STRIDE) / 8).astype(scores.LOGPROB).tofile(temporary / f"{stem}{scores.LOGPROBS}")
            splits[split] = {"shards": tokens.about["shards"]}
        about = {"shards": shards.digest(source), "teacher": {"digest": digest}, "k": k, "dtype": "uint32",
                 "splits": splits}  # fmt: skip
        (temporary / scores.DESCRIPTION).write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("context", [7, 64, 200])
def test_each_trained_token_of_a_row_has_its_own_scores(tmp_path, masked, context):
    source = write_source(tmp_path / "talk", masked)
    folder_ = write_scores(tmp_path / "scores-talk-1", source)
    assert len(TokenShards(source, "train").about["shards"]) > 2
    for split in shards.SPLITS:
        tokens = TokenShards(source, split)
        packed = PackedRows(tokens, context, Scores(folder_, split, tokens))
        plain = PackedRows(tokens, context)
        assert masked or context == 200 or (packed.plan.offset > 0).any(), "no document is cut"
        for index in range(len(packed)):
            row, without = packed.row(index, K), plain.row(index)
            assert (row.teacher_ids.shape, row.teacher_ids.dtype) == ((context, K), np.int32)
            assert row.teacher_logprobs.dtype == np.float16 and without.teacher_ids is None
            trained = row.labels != IGNORE
            assert (row.teacher_ids[~trained] == UNSCORED).all() and (row.teacher_logprobs[~trained] == 0).all()
            ids = row.labels[trained][:, None] + np.arange(K)
            assert (row.teacher_ids[trained] == ids).all()
            assert (row.teacher_logprobs[trained] == (-(ids % STRIDE) / 8).astype(np.float16)).all()
            for name in ("input_ids", "labels", "document_ids"):
                assert (getattr(row, name) == getattr(without, name)).all()


def test_a_piece_from_the_middle_of_a_conversation(tmp_path):
    source = write_source(tmp_path / "talk", masked=True)
    tokens = TokenShards(source, "train")
    reader = Scores(write_scores(tmp_path / "scores-talk-1", source), "train", tokens)
    for document, size in enumerate(SIZES):
        whole = reader.piece(document, 0, size, K)
        for offset in range(0, size, 5):
            part = reader.piece(document, offset, size - offset, K)
            assert all((one[offset:] == other).all() for one, other in zip(whole, part, strict=True))


def test_batches_mix_sources_with_and_without_scores_and_take_the_k_that_all_have(tmp_path):
    sources = {"talk": write_source(tmp_path / "talk", True), "more": write_source(tmp_path / "more", True),
               "plain": write_source(tmp_path / "plain", False)}  # fmt: skip
    folders = {"talk": write_scores(tmp_path / "scores-talk-1", sources["talk"], 4),
               "more": write_scores(tmp_path / "scores-more-1", sources["more"], 2)}  # fmt: skip
    options = {"context": 64, "seed": 5, "phase": 0, "batch_rows": 7, "micro_rows": 3}
    weights = {"talk": 0.4, "more": 0.3, "plain": 0.3}
    mixed = PhaseLoader(sources, weights, scores=folders, **options)
    without = PhaseLoader(sources, weights, **options)
    kinds = set()
    for first in range(0, 28, 7):
        for batch, plain in zip(mixed.step(first), without.step(first), strict=True):
            assert batch.teacher_ids.shape == (*batch.labels.shape, 2) == batch.teacher_logprobs.shape
            assert plain.teacher_ids is None
            for field in dataclasses.fields(plain):
                if getattr(plain, field.name) is not None:
                    assert (getattr(batch, field.name) == getattr(plain, field.name)).all()
            for labels, ids in zip(batch.labels, batch.teacher_ids[..., 0], strict=True):
                is_scored = (ids != UNSCORED).any().item()
                assert (ids[labels != IGNORE] == labels[labels != IGNORE]).all() or not is_scored
                kinds.add(is_scored)
    for loader in (mixed, without):
        loader.close()
    assert kinds == {True, False}


def test_validation_has_the_scores_of_its_own_split(tmp_path):
    source = write_source(tmp_path / "talk", masked=False)
    folder_ = write_scores(tmp_path / "scores-talk-1", source)
    for batch in validation_batches(source, 64, 3, None, 0, 1, folder_):
        trained = batch.labels != IGNORE
        assert (batch.teacher_ids[trained][:, 0] == batch.labels[trained]).all()
    assert all(batch.teacher_ids is None for batch in validation_batches(source, 64, 3, None, 0, 1))


def test_scores_belong_to_the_shards_whose_digest_they_name(tmp_path):
    talk, other = write_source(tmp_path / "talk", True), write_source(tmp_path / "other", False)
    one = write_scores(tmp_path / "scores-talk-1", talk, digest="0ff")
    two = write_scores(tmp_path / "scores-talk-2", talk, digest="e11")
    write_scores(tmp_path / "scores-other-1", other)
    assert scores.beside(talk) == [one, two] and scores.beside(talk, "e1") == [two]
    assert scores.beside(talk, "hub:a/b") == []
    assert scores.digest(one) == scores.digest(two)  # the same numbers
    assert scores.teacher_of({"teacher": {"model": "a/b", "revision": "c"}}) == "hub:a/b"


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"shards": "0ff"}', "\udcff"])
def test_a_description_that_is_none_is_named(tmp_path, content):
    source = write_source(tmp_path / "talk", masked=False)
    path = write_scores(tmp_path / "scores-talk-1", source)
    (path / scores.DESCRIPTION).write_text(content, errors="surrogateescape")
    with pytest.raises(SourceError, match="scores-talk-1/scores.json does not describe scores.*distill.score again"):
        scores.beside(source)
