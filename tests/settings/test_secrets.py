"""Secrets are refused in a config, never shown, and in nothing that a run writes."""

import sys
from pathlib import Path

import pytest

from settings import ConfigError, load, secrets
from tests import warm
from training.settings import RunConfig

ROOT = Path(__file__).resolve().parents[2]
HUB = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.path", f"hub:{HUB}@owner/name"),
        ("watch.wandb", WANDB),
        ("data.sources.stories.from", "hub:https://me:hunter2secret@host/x"),
        ("watch.api_key", "anything"),
        ("hf_token", "short"),
        ("run.name", "sk-" + "a1B2" * 8),
        ("run.name", "xoxb-" + "1234567890-abc"),
        ("run.name", "glpat-" + "a1B2" * 5),
        ("run.name", "AIza" + "a1B2" * 9),
        ("run.name", "eyJ" + "hbGciOiJI" + ".eyJ" + "zdWIiOiIx" + ".a1B2"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(key, value):
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, ROOT / "config.yaml", [f"{key}={value}", "model.d_model=wrong"])
    text = str(caught.value)
    assert f"{key}: a config is no place for secrets" in text and "HF_TOKEN" in text
    assert value not in text and "hunter2secret" not in text and "model.d_model" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.path", f"/cache/models--x--y/snapshots/{WANDB}/tokenizer.json"),  # a commit, in a path
        ("run.name", "tokens-and-keys"),
        ("phases.0.tokens", "500000"),
        ("data.sources.stories.from", "hub:owner/name/config"),
    ],
)
def test_what_only_looks_a_little_like_one_is_fine(key, value):
    assert not secrets.looks_secret(key, value)


def test_planted_secrets_are_in_nothing_that_a_run_writes(tiny, tmp_path):
    """The tools' tokens are in the environment, where they belong, and wandb is on, offline."""
    planted = {"HF_TOKEN": HUB, "WANDB_API_KEY": WANDB, "WANDB_MODE": "offline", "MY_PASSWORD": "correct-horse-battery"}
    phases = "phases=[{name: short, context: 64, data: {stories: 1}, tokens: 2048, batch_tokens: 1024}]"
    shards = f"data.shards={tmp_path / 'shards'}"
    arguments = [part for part in tiny("run", phases, shards) if part != "watch.wandb=off"] + ["watch.wandb=auto"]
    done = warm.run(sys.executable, "multigpu_train.py", *arguments, **planted)
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in written) and len(written) > 15
    for secret in (HUB, WANDB, "correct-horse-battery"):
        assert secret not in done.stdout + done.stderr
        assert [path for path in written if secret.encode() in path.read_bytes()] == []
