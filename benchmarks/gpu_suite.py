"""Everything that one GPU can show, in one command: python -m benchmarks.gpu_suite --json FILE

Attention's values and gradients against the float64 reference, a short training run of every recipe that fits the card
with and without torch.compile (tokens/s, MFU, peak memory beside the plan's), and a checkpoint's round trip. --recipes
names some, to be done sooner. --only names sections: these three, or `teacher` (benchmarks/gpu_teacher.py), which needs
nothing but torch. Without a GPU the same checks run small on the CPU and say so; what was skipped is listed with the
reason. Exit codes: 0 all checks hold, 1 one does not.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from benchmarks import result
from benchmarks.device import Row, free, not_alone, wait
from machine import hardware
from models import ModelConfig, build_model
from models.compilation import compile_blocks
from models.kernels.attention import Layout, attention, choose_kernel, reference

if TYPE_CHECKING:
    from training.settings import OptimizerSection

SECTIONS = ("attention", "training", "checkpoint", "teacher")
STEPS, WARMUP = 20, 5

SHAPES = {  # name: (batch, query heads, key/value heads, tokens, head width, window)
    "windowed": (2, 8, 2, 1024, 64, 128),
    "global": (2, 8, 2, 512, 64, None),
    "window does not divide": (1, 4, 4, 300, 32, 128),
    "flow-1b, windowed": (1, 16, 8, 512, 128, 128),
    "flow-1b, global": (1, 16, 8, 512, 128, None),
}
RECIPES = ("helium-13m", "helium-nano-45m", "slm-tinystories", "smollm-135m", "smolm135", "flow-qwen", "flow-1b")
BATCH_TOKENS = 16384  # of one micro-batch on a GPU, halved until it fits
DOCUMENTS = 3  # packed in a row
TINY = ModelConfig(vocab_size=1024, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, window=32, context=128)


def main() -> int:
    """Run every check, print the tables, write the JSON."""
    parser = result.parser(__doc__)
    parser.add_argument("--recipes", nargs="*", default=RECIPES, metavar="NAME", help="files of configs/ (all)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS[:3], metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)} (all but the last)")  # fmt: skip
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skipped = [] if device.type == "cuda" else ["no CUDA device: everything ran small, on the CPU"]
    sections: dict[str, list[Row]] = {}
    if "attention" in arguments.only:
        sections["attention"] = attention_rows(device, skipped)
    if "training" in arguments.only:
        sections["training"] = training_rows(device, arguments.recipes, skipped)
    if "checkpoint" in arguments.only:
        sections["checkpoint"] = []
        with not_alone(sections["checkpoint"], {"check": "round trip"}, skipped):
            sections["checkpoint"].append(checkpoint_row(device))
    if "teacher" in arguments.only:
        from benchmarks.gpu_teacher import teacher_rows

        sections["teacher"] = teacher_rows(device, skipped)
    skipped.append("several cards, NCCL and sharded strategies: one card cannot show them")
    for name, rows in sections.items():
        print(f"\n{name}\n{result.table(rows)}")
    print("\nskipped\n" + "\n".join(f"  {line}" for line in skipped))
    result.write("gpu_suite", sections, arguments.json, skipped=skipped)
    failed = [row for rows in sections.values() for row in rows if row.get("holds") is False]
    return 1 if failed else 0


def attention_rows(device: torch.device, skipped: list[str]) -> list[Row]:
    """Relative error of attention's output and gradients against float64, in fp32 (TF32 off) and, on CUDA, bf16."""
    rows = []
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
    for name, shape in SHAPES.items():
        for dtype in [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else []):
            about = {"shape": name, "dtype": str(dtype)[6:]}
            with not_alone(rows, about, skipped):
                errors = attention_errors(device, dtype, *shape)
                rows.append({**about, **errors, "holds": max(errors.values()) <= allowed[dtype]})
    return rows


def attention_errors(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv: int,
    tokens: int,
    width: int,
    window: int | None,
) -> dict[str, float]:
    """Largest difference over largest value, of the output and of each gradient, on three packed documents a row."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(batch, n, tokens, width, generator=generator).to(device, dtype).requires_grad_()

    query, key, value = draw(heads), draw(kv), draw(kv)
    documents = (torch.arange(tokens) * DOCUMENTS // tokens).expand(batch, tokens).to(device)
    layout = Layout.of(documents, tokens, device, choose_kernel(device, width, dtype).name)
    weight = torch.randn(batch, heads, tokens, width, generator=generator).to(device, dtype)
    out = attention(query, key, value, window, layout.mask(window))
    ours = [out, *torch.autograd.grad((out * weight).sum(), (query, key, value))]
    exact = reference(query, key, value, window, documents)
    theirs = [exact, *torch.autograd.grad((exact * weight.double()).sum(), (query, key, value))]
    errors = [float(((a.double() - b).abs().max() / b.abs().max()).detach()) for a, b in zip(ours, theirs, strict=True)]
    return dict(zip(("output", "query", "key", "value"), errors, strict=True))


def training_rows(device: torch.device, recipes: list[str], skipped: list[str]) -> list[Row]:
    """Tokens/s, MFU and memory of a short training run, compiled and not, on the same batch."""
    from training.settings import OptimizerSection

    rows = []
    cuda = device.type == "cuda"
    for name in recipes if cuda else ["tiny"]:
        config = result.recipe_model(name) if cuda else TINY
        settings = result.recipe(name).optimizer if cuda else OptimizerSection()
        most = max(1, BATCH_TOKENS // config.context) if cuda else 4
        for compiled in [False, True] if cuda else [False]:
            with not_alone(rows, {"model": name, "compile": compiled}, skipped):
                rows.append(_largest_that_fits(device, name, config, settings, most, compiled))
    if not cuda:
        skipped.append("torch.compile: takes minutes on a CPU")
    return rows


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


def checkpoint_row(device: torch.device) -> Row:
    """Save from the device, load on the CPU and on the device: same bits, same logits."""
    from checkpoints import RunState, checkpoint, load_model
    from tokenizer import Tokenizer
    from training.optimizer import MuonAdamW

    model = build_model(TINY, seed=3).to(device)
    optimizer = MuonAdamW(model.named_parameters())
    ids = torch.randint(0, TINY.vocab_size, (2, TINY.context), device=device)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    tokenizer = Tokenizer.train(["a tokenizer for a round trip"] * 2, TINY.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(
            Path(folder), RunState(seed=3, step=1),
            model={name: tensor.cpu() for name, tensor in model.state_dict().items()},
            optimizer={name: tensor.cpu() for name, tensor in optimizer.tensors().items()},
            model_config=TINY, run_config={}, tokenizer=tokenizer,
        )  # fmt: skip
        loaded, _, _ = load_model(path, str(device))
        saved_optimizer = checkpoint.read_optimizer(path)
    with torch.no_grad():
        same_logits = torch.equal(loaded(ids), model(ids))
    same_state = all(torch.equal(saved_optimizer[name], tensor.cpu()) for name, tensor in optimizer.tensors().items())
    return {"logits": "equal" if same_logits else "differ", "optimizer": "equal" if same_state else "differ",
            "holds": same_logits and same_state}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
