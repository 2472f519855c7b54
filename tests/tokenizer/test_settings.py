"""The tokenizer's section of the config: each wrong value is reported with its key and what would be right."""

import pytest

import settings
from tokenizer import Tokenizer
from tokenizer.settings import TokenizerSection


class Whole(settings.Section):
    tokenizer: TokenizerSection = TokenizerSection()


def problems(**keys: object) -> list[settings.Problem]:
    with pytest.raises(settings.ConfigError) as error:
        settings.validate(Whole, {"tokenizer": keys})
    return error.value.problems


def test_defaults_train_one():
    section = settings.validate(Whole, {}).tokenizer
    assert section.path is None and section.vocab_size == 4_096


@pytest.mark.parametrize("size", [1_023, 50_258, "many"])
def test_size_out_of_range(size):
    (problem,) = problems(vocab_size=size)
    assert (problem.key, problem.value) == ("tokenizer.vocab_size", size)


def test_paths_that_hold_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"dim": 3}')
    for path in tmp_path / "missing", tmp_path, tmp_path / "config.json":
        (problem,) = problems(path=str(path))
        assert (problem.key, problem.value) == ("tokenizer.path", str(path))
        assert "tokenizer.json" in problem.remedy


def test_two_problems_at_once(tmp_path):
    assert {problem.key for problem in problems(path=str(tmp_path / "no"), vocab_size=7)} == {
        "tokenizer.path", "tokenizer.vocab_size"
    }  # fmt: skip


def test_paths_that_do(tmp_path):
    Tokenizer.train(["a b"], 1_024).save(tmp_path)
    for path in tmp_path, tmp_path / "tokenizer.json":
        assert settings.validate(Whole, {"tokenizer": {"path": str(path)}}).tokenizer.path == str(path)


def test_hub_names_are_checked_by_form_only():
    assert settings.validate(Whole, {"tokenizer": {"path": "hub:someone/some-model.v1"}})
    for wrong in "hub:", "hub:gpt2", "hub:a/b/c", "hub:a b/c":
        (problem,) = problems(path=wrong)
        assert "hub:OWNER/NAME" in problem.remedy
