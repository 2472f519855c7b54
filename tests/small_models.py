"""Small models for tests: the recipes at their real pattern, heads and context, with weights that make every key
count."""

import dataclasses
from pathlib import Path

import torch

from models import ModelConfig, build_model
from settings import read, validate
from training.settings import RunConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PUBLISHED = ("helium-13m", "helium-nano-45m", "slm-tinystories", "smollm-135m", "smolm135", "flow-1b", "flow-qwen")


def published(name: str) -> ModelConfig:
    """The model of configs/NAME.yaml."""
    config = validate(RunConfig, read(CONFIGS / f"{name}.yaml"))
    return config.model.config(config.model.vocab_size, config.longest_context)


def narrow(config: ModelConfig) -> ModelConfig:
    """The same depth, pattern, heads and context with a small width and vocabulary, and nothing recomputed."""
    width = 4 * config.n_heads
    return dataclasses.replace(
        config, vocab_size=101, d_model=width, head_dim=4, d_ff=2 * width, dropout=0.0, gradient_checkpointing=False
    )


def shrunk(config: ModelConfig) -> ModelConfig:
    """`narrow`, and of many layers two rounds of the pattern and what is left over of the last one: more of them would
    only repeat it."""
    depth, rounds = config.n_layers, config.global_every or 2
    return dataclasses.replace(narrow(config), n_layers=depth if depth <= 10 else 2 * rounds + depth % rounds)


def build_awake(config: ModelConfig, seed: int = 0):
    """A model whose attention is peaked and whose logits spread, so that a wrong key or position shows in them; at
    initialisation both are nearly even and hide mistakes. Signs in the last norm keep it from echoing its input."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter.mul_(2)
            elif name == "embedding.weight":
                parameter.mul_(0.5 / parameter.std())
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.final_norm.weight.mul_(torch.randn(config.d_model, generator=generator).sign() / 3)  # logits of size 1
    return model.eval()
