"""A small random model in a run's folder, for tests of the evaluation commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import checkpoints
from checkpoints import checkpoint
from models import ModelConfig, build_model
from tokenizer import Tokenizer

TEXT = ["How many apples has Ann with 12 and 7 more? Question: Answer: #### 19 eggs a day, $5 in all.\n"] * 3


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """make_run(name, seed=0, context=512, valid_fraction=None) -> a run's folder with one checkpoint."""
    import torch

    tokenizer = Tokenizer.train(TEXT, 1024)
    root = tmp_path_factory.mktemp("runs")

    def make_run(name: str, seed: int = 0, context: int = 512, valid_fraction: float | None = None) -> Path:
        torch.manual_seed(seed)
        shape = ModelConfig(
            vocab_size=tokenizer.vocab_size, context=context, n_layers=1, d_model=16, n_heads=2, d_ff=16
        )
        model = build_model(shape)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        config = {} if valid_fraction is None else {"data": {"valid_fraction": valid_fraction}}
        checkpoint.save(
            root / name / "checkpoints", checkpoints.RunState(seed=1),
            model={key: tensor.contiguous() for key, tensor in model.state_dict().items()}, optimizer={},
            model_config=shape, run_config=config, tokenizer=tokenizer,
        )  # fmt: skip
        return root / name

    return make_run


@pytest.fixture
def word_problems(tmp_path):
    """word_problems(count, name) -> a JSONL file of that many problems, as GSM8K writes them."""

    def word_problems(count: int, name: str = "problems.jsonl") -> Path:
        rows = [{"question": f"Ann has {n} eggs and gets {n % 7} more. How many?{' Say it.' * (n % 3)}",
                 "answer": f"She has {n} + {n % 7} = <<{n}+{n % 7}={n + n % 7}>>{n + n % 7} eggs.\n#### {n + n % 7}"}
                for n in range(count)]  # fmt: skip
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return word_problems
