"""How fast does this device train? Sections `training` and `other-recipes` of benchmarks/gpu_suite.py.

A short run of each recipe that fits the card, compiled and not: tokens/s, MFU, peak memory beside the plan's.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from benchmarks import result
from benchmarks.device import Findings, Row, free, wait
from benchmarks.gpu_kernels import DOCUMENTS
from machine import hardware
from models import ModelConfig, build_model
from models.compilation import compile_blocks
from models.kernels.attention import choose_kernel

if TYPE_CHECKING:
    from training.settings import OptimizerSection

STEPS, WARMUP = 20, 5
FIRST = ("smollm-135m", "flow-1b", "helium-nano-45m")
OTHERS = ("helium-13m", "slm-tinystories", "smolm135", "flow-qwen")
BATCH_TOKENS = 16384  # of one micro-batch on a GPU, halved until it fits
TINY = ModelConfig(vocab_size=1024, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, window=32, context=128)


def training_rows(findings: Findings, recipes: Sequence[str] = FIRST) -> None:
    """A row a recipe, files of configs/, compiled and not, on the same batch."""
    from training.settings import OptimizerSection

    device = findings.device
    cuda = device.type == "cuda"
    for name in recipes if cuda else ["tiny"]:
        config = result.recipe_model(name) if cuda else TINY
        settings = result.recipe(name).optimizer if cuda else OptimizerSection()
        most = max(1, BATCH_TOKENS // config.context) if cuda else 4
        for compiled in [False, True] if cuda else [False]:
            with findings.measuring(model=name, compile=compiled):
                findings.add(_largest_that_fits(device, name, config, settings, most, compiled))
    if not cuda:
        findings.skip("torch.compile and the recipes' speed: they take minutes on a CPU")


def other_recipes(findings: Findings) -> None:
    """The rows of the recipes that are not the first."""
    if findings.device.type == "cuda":
        training_rows(findings, OTHERS)


def _largest_that_fits(
    device: torch.device, name: str, config: ModelConfig, settings: "OptimizerSection", micro_batch: int, compiled: bool
) -> Row:
    while True:
        try:
            return training_row(device, name, config, settings, micro_batch, compiled)
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        free()  # here, where the error no longer holds on to what it interrupted
        micro_batch //= 2


def training_row(
    device: torch.device, name: str, config: ModelConfig, settings: "OptimizerSection", micro_batch: int, compiled: bool
) -> Row:
    """Train `STEPS` steps on one repeated batch, in bf16 on CUDA, as the trainer does; the loss must fall."""
    from data.loader import Batch
    from training.objectives import NextToken
    from training.optimizer import MuonAdamW

    torch.manual_seed(0)
    objective = NextToken(build_model(config, device=device)).train()
    optimizer = MuonAdamW.of(objective.model, settings)
    if compiled:
        compile_blocks(objective.model)
    tokens = torch.randint(0, config.vocab_size, (micro_batch, config.context + 1), device=device)
    documents = (torch.arange(config.context, device=device) * DOCUMENTS // config.context).expand(micro_batch, -1)
    seeds = torch.arange(micro_batch, device=device)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], documents, seeds, seeds)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, began = [], 0.0
    for step in range(STEPS + WARMUP):
        if step == WARMUP:
            wait(device)
            began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=cuda):
            loss, trained, _ = objective(batch)
        (loss / trained).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), settings.clip or float("inf"), foreach=True)
        optimizer.step(only_if=grad_norm.isfinite())
        optimizer.zero_grad()
        losses.append(loss.detach() / trained)
    wait(device)
    rate = STEPS * micro_batch * config.context / (time.perf_counter() - began)
    flops = config.flops_per_token(config.context // DOCUMENTS)  # keys of other documents are not looked at
    peak = hardware.peak_flops(torch.cuda.get_device_name(), dtype) if cuda else None
    return {
        "model": name,
        "attention": choose_kernel(device, config.d_head, dtype).name,
        "compile": compiled,
        "micro_batch": micro_batch,
        "tokens_per_second": rate,
        "mfu": hardware.flops_utilization(rate, flops, peak),
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "planned_memory": sum(planned_memory(config, micro_batch).values()),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "holds": bool(losses[-1] < losses[0]),
    }


def planned_memory(config: ModelConfig, micro_batch: int) -> dict[str, int]:
    """What `--dry-run` would say about this model and micro-batch in bf16."""
    from training.budget import memory_bytes
    from training.settings import PhaseSection, RunConfig

    positions = micro_batch * config.context
    phase = PhaseSection(name="x", context=config.context, data={"x": 1}, tokens=positions, batch_tokens=positions,
                         micro_batch=micro_batch)  # fmt: skip
    run = RunConfig.model_validate({"data": {"sources": {}}, "phases": [phase], "parallel": {"precision": "bf16"}})
    return memory_bytes(config, run, phase)
