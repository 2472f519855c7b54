"""The plan counts what will really be there: parameters, tokens, steps, FLOPs; and says it as text and as JSON."""

import json
import sys

import pytest

from data.settings import SourceSection
from models import build_model
from settings import ConfigError, read, validate
from training.budget import estimated_tokens, plan
from training.settings import RunConfig

CONFIG = validate(RunConfig, read("config.yaml"))


def planned(*overrides: str):
    return plan(validate(RunConfig, read("config.yaml", overrides)))


def test_plan_counts_the_model_that_is_built():
    estimate = planned("model.vocab_size=777", "model.n_kv_heads=1", "model.window=null")
    assert estimate.as_json()["parameters"] == sum(p.numel() for p in build_model(estimate.model).parameters())


def test_tokens_and_steps_are_those_of_the_phases():
    estimate = planned("phases.0.tokens=100000", "phases.0.batch_tokens=4096", "phases.1.tokens=2048")
    first, second, third = estimate.phases
    assert (first.steps, first.tokens) == (24, 24 * 4096)
    assert (second.steps, second.tokens) == (1, 2048)
    assert estimate.tokens == first.tokens + second.tokens + third.tokens
    assert first.flops == first.tokens * estimate.model.flops_per_token(256)
    assert third.flops / third.tokens > first.flops / first.tokens  # longer contexts cost more a token


def test_memory_follows_micro_batch_and_checkpointing():
    small, large = planned("phases.2.micro_batch=1"), planned("phases.2.micro_batch=1", "phases.2.batch_tokens=8192")
    assert small.phases[2].memory_bytes == large.phases[2].memory_bytes  # accumulation costs no memory
    kept, recomputed = planned("phases.0.micro_batch=8"), planned("model.gradient_checkpointing=true")
    assert recomputed.memory["activations"] < 0.6 * kept.memory["activations"]
    exact = kept.model.parameters()
    assert kept.memory["weights"] == kept.memory["gradients"] == 4 * exact["total"]


def test_disk_holds_every_checkpoint_that_is_kept_and_what_is_read_of_a_source_of_unknown_size():
    one = planned("checkpoint.keep=1", "checkpoint.keep_best=false", "checkpoint.keep_phase_ends=false")
    size = one.disk["checkpoints"] / 2  # and the one that is being written
    kept = planned("checkpoint.keep=3", "checkpoint.keep_every_steps=100000")
    assert kept.disk["checkpoints"] == (3 + 1 + 2 + 1) * size  # newest, best, ends of two phases, and the next
    hub = planned("data.sources.stories={from: hub:someone/stories}")
    assert hub.corpus_tokens["stories"] is None
    read_of_it = hub.disk["shards"] - sum(tokens * 2 for tokens in hub.corpus_tokens.values() if tokens)
    shares = (phase.data.get("stories", 0) / sum(phase.data.values()) * phase.tokens for phase in CONFIG.phases)
    assert read_of_it == pytest.approx(2 * sum(shares), rel=1e-3)


def test_facts_are_estimated_as_many_as_there_are():
    of = {"from": "embedded:facts", "conversations": True}
    every, more, few = (estimated_tokens(SourceSection(**of, documents=count)) for count in (None, 9_000, 144))
    assert every == more == pytest.approx(2 * few, abs=1) and 2_000 < every < 10_000  # 288 short conversations


def test_the_plan_knows_the_limits_of_loss_and_optimizer():
    """They are stated twice, because a plan must not wait for torch."""
    from models.kernels import losses
    from training import budget, optimizer

    assert budget.MOST_STACKED == optimizer.MOST_STACKED
    assert budget.LOGITS_AT_ONCE is losses.LOGITS_AT_ONCE


def test_dry_run_as_json_is_one_object(run):
    finished = run(sys.executable, "multigpu_train.py", "--dry-run", "--json", "run.folder=nowhere")
    found = json.loads(finished.stdout)
    assert finished.returncode == 0
    assert {"parameters", "tokens", "flops_per_token", "memory_bytes", "phases"} <= set(found)
    assert [phase["name"] for phase in found["phases"]] == ["stories", "reasoning", "long-context"]


def test_vocabulary_smaller_than_the_named_tokenizer_is_refused(real_data):
    tokenizer = f"tokenizer.path={real_data / 'tokenizers' / 'gpt2_tokenizer.json'}"
    assert planned(tokenizer).model.vocab_size == 50257
    with pytest.raises(ConfigError, match=r"model\.vocab_size: use at least the tokenizer's 50257 entries"):
        planned(tokenizer, "model.vocab_size=50000")
