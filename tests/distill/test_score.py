"""The command: its scores are the teacher's own, whatever was killed and however often, and it refuses what it cannot
score rightly."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
from data import embedded, scores, shards
from data.loader import IGNORE
from data.prepare import Config, prepare
from data.scores import Scores
from data.token_shards import TokenShards
from distill import score
from settings import validate
from storage import folder
from tests.distill.conftest import save_teacher

K = 8


@pytest.fixture(scope="module")
def sources(teacher, tmp_path_factory) -> dict[str, Path]:
    """Shards of conversations and of plain text, each split in several, in the teacher's tokenizer."""
    root = tmp_path_factory.mktemp("shards")
    found = [embedded.problem(index, "train", 5) for index in range(30)]
    rows = [{"question": task.question, "answer": task.solution} for task in found]
    texts = [{"text": text} for text in embedded.documents("stories", "train", 10, 5)]
    for name, lines in (("talk", rows), ("text", texts)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = validate(Config, {
        "data": {"shards": str(root), "valid_fraction": 0.2, "workers": 1, "sources": {
            "talk": {"from": f"jsonl:{root / 'talk.jsonl'}", "conversations": True},
            "text": {"from": f"jsonl:{root / 'text.jsonl'}"}}},
        "tokenizer": {"path": str(checkpoints.tokenizer_of(checkpoints.locate(teacher)))},
    })  # fmt: skip
    return prepare(config.data, config.tokenizer, lambda _: None, shard_tokens=1000).sources


@pytest.fixture
def call(teacher, monkeypatch) -> Callable[..., int]:
    """call(shards, *options): the exit code of the command with the teacher of these tests, in small parts."""
    monkeypatch.setattr(score, "PART_TOKENS", 400)
    return lambda path, *options: score.main([str(path), "--teacher", str(teacher), "--k", str(K), *options])


def copy_of(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to / path.name))


def made(path: Path) -> Path:
    (found,) = (entry for entry in path.parent.glob("scores-*") if entry.is_dir())
    return found


def numbers(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != folder.MANIFEST}


@pytest.mark.parametrize(("name", "context"), [("talk", 1024), ("text", 1024), ("text", 48)])
def test_scores_are_the_teachers_own_of_what_training_reads(sources, teacher, call, tmp_path, name, context):
    path = copy_of(sources[name], tmp_path)
    assert call(path, "--context", str(context), "--batch", "3") == 0
    found = made(path)
    about = scores.describe(found)
    assert not folder.verify(found) and about["shards"] == shards.digest(path) and about["k"] == K
    model, tokenizer, _ = checkpoints.load_model(teacher)
    cut = 0
    for split in shards.SPLITS:
        tokens = TokenShards(path, split)
        assert about["splits"][split]["scored"] == tokens.trained_tokens
        assert split == "valid" or len(tokens.tokens) > 1
        reader = Scores(found, split, tokens)
        for document, length in enumerate(tokens.lengths.tolist()):
            for offset in range(0, length, context):
                cut += offset > 0
                size = min(context, length - offset)
                inputs, labels = tokens.piece(document, offset, size)
                assert offset or inputs[0] == tokenizer.end_of_text
                with torch.no_grad():
                    logits = model(torch.from_numpy(inputs)[None])[0, :, : tokenizer.vocab_size]
                logprobs = logits.double().log_softmax(-1)[torch.from_numpy(labels != IGNORE)]
                ids, values = (torch.from_numpy(part[labels != IGNORE]) for part in
                               reader.piece(document, offset, size, K))  # fmt: skip
                expected = logprobs.topk(K).values
                torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(logprobs.gather(1, ids.long()), expected, rtol=1e-4, atol=1e-4)
                assert all(len(set(row)) == K for row in ids.tolist())
    assert (cut > 0) == (context == 48)


def _killed(work: Callable[[], object], place: object, name: str, left: int) -> int:
    """The signal that ended a process of its own, which kills itself when a function is called for the n-th time."""
    child = os.fork()
    if not child:
        whole = getattr(place, name)

        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments, **options)

        setattr(place, name, counted)
        try:
            work()
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_whatever_is_killed_the_bytes_are_those_of_the_unbroken_run(sources, teacher, call, tmp_path, capsys):
    unbroken, broken = (copy_of(sources["talk"], tmp_path / name) for name in ("unbroken", "broken"))
    assert call(unbroken) == 0
    for place, name, left in ((score._Job, "_scored", 4), (shutil, "copyfileobj", 3)):  # in a part, and in joining
        assert _killed(lambda: call(broken), place, name, left) == signal.SIGKILL  # noqa: B023  it is called at once
        assert not list(broken.parent.glob("scores-*"))
        parts = list(broken.parent.glob(".scores-*/0*"))
        assert len(parts) >= 3 and not [fault for part in parts for fault in folder.verify(part)]
        (parts[0] / "part.top_ids").write_bytes(b"torn")  # which is noticed, and made again
    assert call(broken) == 0
    assert numbers(made(broken)) == numbers(made(unbroken)) and made(broken).name == made(unbroken).name
    assert not list(broken.parent.glob(".scores-*")) and not list(broken.parent.glob(".tmp-*"))
    capsys.readouterr()
    before = (made(broken) / scores.DESCRIPTION).stat()
    assert call(broken) == 0 and "already there" in capsys.readouterr().out
    assert (made(broken) / scores.DESCRIPTION).stat() == before
    (made(broken) / "train-00000.top_ids").write_bytes(b"torn")
    assert call(broken) == 0 and numbers(made(broken)) == numbers(made(unbroken))


def test_processes_share_the_parts(sources, teacher, call, tmp_path, monkeypatch):
    """One that comes when another holds a part makes the others, and both end with the same folder."""
    unbroken, shared = (copy_of(sources["talk"], tmp_path / name) for name in ("unbroken", "shared"))
    assert call(unbroken) == 0
    scored_by: dict[str, list[score.Part]] = {"0": [], "1": []}
    whole = score._Job._scored

    def noted(self, tokens: TokenShards, part: score.Part):
        scored_by[threading.current_thread().name].append(part)
        return whole(self, tokens, part)

    monkeypatch.setattr(score._Job, "_scored", noted)
    threads = [threading.Thread(target=score.score, name=str(rank),
                                args=(shared, str(teacher), score.Manner(K), rank, 2, lambda _: None))
               for rank in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(made(shared)) == numbers(made(unbroken))
    one, other = scored_by.values()
    assert one and other and not set(one) & set(other)


def test_what_makes_other_scores_makes_another_folder(sources, call, tmp_path):
    path = copy_of(sources["talk"], tmp_path)
    for options in ((), ("--k", "4"), ("--context", "64")):
        assert call(path, *options) == 0
    found = [scores.describe(entry) for entry in path.parent.glob("scores-*")]
    assert len({about["k"] for about in found}) == 2 and len(found) == 3


def test_what_cannot_be_scored_is_refused_in_one_line(sources, call, tmp_path, capsys):
    path = copy_of(sources["talk"], tmp_path)
    stranger = save_teacher(tmp_path / "stranger", ["quite another text than the others, again and again " * 9])
    told = shards.describe(path)["tokenizer_fingerprint"]

    def fault(code: int, *arguments: object) -> str:
        assert score.main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "Traceback" not in said.err
        assert not list(tmp_path.glob("*scores-*"))
        return said.err

    other = fault(2, path, "--teacher", stranger)
    _, tokenizer, _ = checkpoints.load_model(stranger)
    assert told in other and tokenizer.fingerprint in other and str(stranger) in other
    assert "dataset.json" in fault(2, tmp_path / "stranger", "--teacher", stranger)
    assert "none" in fault(1, path, "--teacher", tmp_path / "none")
    (path / "train-00000.tokens").write_bytes(b"torn")
    assert "train-00000.tokens" in fault(1, path, "--teacher", stranger)


def test_more_entries_than_there_are_are_refused(sources, teacher, capsys):
    assert score.main([str(sources["talk"]), "--teacher", str(teacher), "--k", "99999"]) == 2
    assert "at most the tokenizer's" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        score.main([str(sources["talk"]), "--teacher", str(teacher), "--k", "0"])
    assert ended.value.code == 2


def test_logits_that_are_no_numbers_are_no_scores(sources, call, tmp_path, monkeypatch, capsys):
    path = copy_of(sources["talk"], tmp_path)
    spoiled = (np.zeros((1, K)), np.full((1, K), np.nan))
    monkeypatch.setattr(score, "_likeliest", lambda *_: [spoiled] * 8)
    assert call(path) == 1 and "no numbers" in capsys.readouterr().err
