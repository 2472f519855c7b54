"""The commands of docs/on-policy.md are a round: each is one that there is, and takes up what the last one made."""

import re
import shlex
from pathlib import Path

import pytest

import settings
from data.prepare import Config
from distill import filter as filtering
from distill import score
from distill.settings import DistillConfig
from tests.conftest import ROOT
from training.settings import RunConfig

PAGE = (ROOT / "docs" / "on-policy.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.*?)\n```", PAGE, flags=re.DOTALL)


def parsed(command: str) -> tuple[str, list[str]]:
    """(module or script, its arguments)."""
    words = [word for word in shlex.split(command) if word not in ("accelerate", "launch", "python", "-m")]
    return words[0], words[1:]


def loaded(section: type, arguments: list[str], only: tuple[str, ...] | None = None):
    assert arguments[0] == "--config"
    return settings.load(section, arguments[1], arguments[2:], only)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder in which the commands find what they name."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("runs/flow-qwen-gsm8k", "traces/round-1-FINGERPRINT", "datasets/round-1-FINGERPRINT/data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "traces/round-1-FINGERPRINT/job.json").touch()
    (tmp_path / "datasets/round-1-FINGERPRINT/data/train-00000-of-00001.parquet").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_are_a_round(place):
    names, arguments = zip(*map(parsed, COMMANDS), strict=True)
    assert names == ("distill.generate", "distill.filter", "data.prepare", "distill.score", "multigpu_train.py")
    job = loaded(DistillConfig, arguments[0])
    train = loaded(RunConfig, arguments[4])
    assert job.teacher.model == train.run.init_from  # the student answers
    assert (job.sampling.temperature, job.prompt.system, job.prompt.examples) == (1.0, None, 0)
    assert job.problems_.valid_fraction >= train.data.valid_fraction

    filtered = filtering._parser().parse_args(arguments[1])
    assert filtered.any_answer and filtered.out == "round-1"
    assert filtered.traces[0].name.startswith(f"{job.job.name}-") and filtering._exams(filtered.evaluation_set)

    prepared = loaded(Config, arguments[2], ("data", "tokenizer"))
    assert prepared.data == train.data  # else the scores would be of other shards
    assert loaded(RunConfig, ["--config", "configs/flow-qwen.yaml"]).tokenizer.path == prepared.tokenizer.path
    traces = train.data.sources["traces"]
    assert traces.conversations and f"datasets/{filtered.out}-" in traces.from_

    scored = score._parse(arguments[3])
    assert scored.shards.name.startswith("traces-") and scored.teacher.startswith("hub:Qwen/Qwen3")
    assert train.phases[0].distill.alpha == 0 and "traces" in train.phases[0].data
