"""Every recipe of configs/ loads, has its published size, and trains on a local file by the override it promises."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from checkpoints import load_model
from models import build_model
from observe.metrics import MetricsLog
from settings import read, validate
from tokenizer import Tokenizer
from training.budget import plan
from training.settings import RunConfig
from training.start import start
from training.trainer import Outcome

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "helium-13m": 13_439_232,
    "helium-nano-45m": 42_609_152,
    "slm-tinystories": 51_213_824,
    "smollm-135m": 134_515_008,
    "smolm135": 148_965_696,
    "flow-1b": 1_199_646_720,
    "flow-qwen": 596_049_920,
    "tinystories-cpu": 4_984_064,
    "chat": 4_984_064,
    "gsm8k-rationales": 134_515_008,
    "qwen3-0.6b-gsm8k": 596_049_920,
    "flow-1b-gsm8k": 1_199_646_720,
    "flow-qwen-gsm8k": 596_049_920,
    "tutor": 984_192,
}
TUNING = {"chat", "gsm8k-rationales", "qwen3-0.6b-gsm8k", "flow-1b-gsm8k", "flow-qwen-gsm8k", "tutor"}  # with weights
LOCAL = {"tinystories-cpu", "chat", "flow-1b-gsm8k", "flow-qwen-gsm8k", "tutor"}  # and with files that may not be there


def promised(name: str) -> str:
    """The override with which, by the first lines of configs/NAME.yaml, it trains on text of one's own."""
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    said = r"(?:(?:text|conversations) of your own|to use your own)"
    return re.search(said + r": (\S+=(?:\{[^}]*\}|\S+PATH))\.", header)[1]


def everything_from(text: Path) -> list[str]:
    """Overrides with which nothing is needed but that file."""
    return [f"data.sources.*.from=jsonl:{text}", "data.sources.*.valid_from=null", "data.evaluation_sets={}",
            "run.init_from=null"]  # fmt: skip


def recipe(name: str, *overrides: str) -> RunConfig:
    return validate(RunConfig, read(ROOT / "configs" / f"{name}.yaml", overrides))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, Path]:
    """A small file of documents, and a tokenizer for the recipes that name one on the Hub."""
    from data import embedded

    folder = tmp_path_factory.mktemp("corpus")
    texts = [*embedded.documents("stories", "train", 300, 1), *embedded.documents("recall", "train", 12, 1)]
    rows = [{"text": text, "prompt": text[:40], "completion": text[40:]} for text in texts]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Tokenizer.train(texts, 1024).save(folder / "tokenizer")
    return folder / "mine.jsonl", folder / "tokenizer"


def test_no_recipe_is_forgotten():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_its_published_size(name, corpus):
    if name in LOCAL:
        config = recipe(name, *everything_from(corpus[0]))
    else:
        config = recipe(name)
        assert all(source.from_.startswith("hub:") for source in config.data.sources.values())
        assert name not in TUNING or config.run.init_from.startswith("hub:")
    planned = plan(config)
    assert planned.model.parameters()["total"] == PARAMETERS[name]
    built = build_model(planned.model, device="meta")
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[name]
    assert planned.tokens == pytest.approx(sum(phase.tokens for phase in config.phases), rel=1e-3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_trains_on_a_local_file(name, corpus, tmp_path):
    """Its depth, pattern, heads, phases and options; a small width, vocabulary and number of tokens, and windows and
    contexts of a quarter: at their real length they are the model tests' (tests/small_models.py)."""
    text, tokenizer = corpus
    own = [promised(name).replace("PATH", str(text))]
    steps = 2
    if name in TUNING:  # its own file replaces one of several sources; from nothing, it needs other rates, and longer
        steps = 5
        own = [*everything_from(text), *own, "optimizer.adamw_lr=0.005", "phases.*.learning_rate={shape: constant}"]
    whole = recipe(name, *own)
    heads, window = whole.model.n_heads, whole.model.window
    contexts = [max(128, phase.context // 4) for phase in whole.phases]  # enough for a conversation
    config = recipe(
        name, *own,
        f"run.folder={tmp_path / 'runs'}", f"data.shards={tmp_path / 'shards'}", f"tokenizer.path={tokenizer}",
        "model.vocab_size=null", f"model.d_model={4 * heads}", "model.head_dim=4", f"model.d_ff={8 * heads}",
        "parallel.device=cpu", "parallel.cpu_threads=1", "watch.wandb=off", "watch.sample_tokens=3",
        "watch.log_every=1",
        f"phases.*.tokens={1024 * steps}", "phases.*.batch_tokens=1024", "phases.*.micro_batch=4",
        *(f"phases.{number}.context={context}" for number, context in enumerate(contexts)),
        f"model.window={window and window // 4}".replace("None", "null"),
        "evaluation.final_tokens=1024", "evaluation.every_steps=null",
    )  # fmt: skip
    assert start(config) is Outcome.FINISHED
    model, _, shape = load_model(config.run.path)
    assert shape == config.model.config(shape.vocab_size, config.longest_context)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    losses = [record["loss"] for record in MetricsLog.read(config.run.path / "metrics.jsonl") if "lr" in record]
    assert len(losses) == steps * len(config.phases)
    assert losses[0] == pytest.approx(torch.tensor(float(shape.vocab_size)).log().item(), rel=0.02)
    assert losses[-1] < losses[0]
