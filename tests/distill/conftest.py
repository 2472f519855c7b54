"""What the tests of trace jobs share: a teacher that knows nothing and takes no time, and a job that asks it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT


def save_teacher(
    folder: Path, texts: list[str], width: int = 32, n_heads: int = 2, seed: int = 3, sharpness: float = 1.0
) -> Path:
    """A run's folder whose model has random weights, and a tokenizer of ours, with its chat template; `sharpness`
    multiplies its logits."""
    import checkpoints
    from checkpoints import checkpoint
    from models import ModelConfig, build_model
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.train(texts, 1024)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, context=1024, n_layers=2, d_model=width, n_heads=n_heads,
                        n_kv_heads=1, d_ff=2 * width)  # fmt: skip
    weights = {name: tensor.contiguous() for name, tensor in build_model(shape, seed=seed).state_dict().items()}
    weights["final_norm.weight"] *= sharpness
    checkpoint.save(
        folder / "checkpoints", checkpoints.RunState(seed=1), model=weights, optimizer={}, model_config=shape,
        run_config={}, tokenizer=tokenizer
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A teacher that knows nothing, and whose tokenizer has read a little of everything."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "data/embedded/stories.py")]
    return save_teacher(tmp_path_factory.mktemp("teacher"), texts)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """60 problems of many lengths, with solutions."""
    names = ["Ann", "Bartholomew", "Mo", "Konstantina"]
    found = []
    for number in range(60):
        question = (f"{names[number % 4]} has {number} apples{' and pears' * (number % 7)}, and buys "
                    f"{number + 2} more. How many are there?")  # fmt: skip
        sum_ = 2 * number + 2
        steps = [f"a = <<{number}={number}>>{number}", f"a + {number + 2} = <<{number}+{number + 2}={sum_}>>{sum_}"]
        found.append({"question": question, "answer": "\n".join([*steps, f"#### {sum_}"])})
    return found


@pytest.fixture
def job(tmp_path, teacher, rows) -> Callable[..., list[str]]:
    """job(*overrides): the arguments of a small job on `rows` in this test's own folder."""
    questions, config = tmp_path / "rows.jsonl", tmp_path / "job.yaml"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config.write_text(yaml.safe_dump({
        "job": {"name": "small", "folder": str(tmp_path / "traces"), "samples": 2, "chunk": 8},
        "problems": {"from": f"jsonl:{questions}", "valid_fraction": 0},
        "sampling": {"max_new_tokens": 4, "temperature": 1.0, "top_k": 20},
        "teacher": {"model": str(teacher), "device": "cpu"},
    }))  # fmt: skip
    return lambda *overrides: ["--config", str(config), *overrides]
