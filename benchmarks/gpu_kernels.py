"""Are the kernels right on this device? Sections `attention` and `decode` of benchmarks/gpu_suite.py.

Attention's output and gradients against the definition in float64, on packed documents, in windowed and global layers,
and whether anything leaks through its masks. Then whole models: a full pass, documents packed, a cache fed in chunks
and token by token past its windows, batches padded on the left, texts, and CUDA graphs, each against a full pass of the
same weights in float64 on the CPU.
"""

import copy
import dataclasses

import torch
from torch import Tensor, nn

from benchmarks.device import Findings
from models import ModelConfig, build_model
from models.inference import captured
from models.inference.captured import CapturedSteps
from models.inference.decoding import generate, prefill
from models.inference.ready import for_decoding
from models.inference.sampling import Sampling
from models.kernels.attention import Layout, attention, choose_kernel, reference

SHAPES = {  # name: (batch, query heads, key/value heads, tokens, head width, window)
    "windowed": (2, 8, 2, 1024, 64, 128),
    "global": (2, 8, 2, 512, 64, None),
    "window does not divide": (1, 4, 4, 300, 32, 128),
    "flow-1b, windowed": (1, 16, 8, 512, 128, 128),
    "flow-1b, global": (1, 16, 8, 512, 128, None),
}
SMALL_SHAPES = {
    "windowed": (2, 4, 2, 256, 32, 64),
    "global": (2, 4, 2, 128, 32, None),
    "window does not divide": (1, 2, 2, 150, 32, 64),
}
DOCUMENTS = 3  # packed in a row
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value

FLOW = ModelConfig(
    vocab_size=512, context=130, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, d_ff=256, window=32, global_every=2
)
MODELS = {
    "windowed and global": FLOW,
    "as Qwen3": dataclasses.replace(FLOW, window=None, global_every=None, head_dim=64, qk_norm=True),
    "as GPT-2": dataclasses.replace(
        FLOW, window=None, global_every=None, n_kv_heads=4, positions="learned", norm="layer", feed_forward="gelu",
        bias=True,
    ),
}  # fmt: skip
CHUNKS = (9, 33, 1, 31)  # of a prompt: shorter and longer than the window; what follows comes token by token
PADDING = (0, 70, 33)  # of three sequences
NEW = 40  # tokens of a text
WEIGHTS = {"fp32": 1e-4, "bf16": 0.1}  # the largest difference from float64, of the logits' norm


def attention_rows(findings: Findings) -> None:
    """Relative errors in fp32 (TF32 off) and, on CUDA, bf16."""
    device = findings.device
    for name, shape in (SHAPES if device.type == "cuda" else SMALL_SHAPES).items():
        for dtype in [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else []):
            about = {"shape": name, "dtype": str(dtype)[6:]}
            with findings.measuring(**about):
                errors = attention_errors(device, dtype, *shape)
                findings.add({**about, **errors, "holds": max(errors.values()) <= ALLOWED[dtype]})


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
    """Largest difference over largest value, of the output and of each gradient, on three packed documents a row; and,
    as `leak`, the same of those outputs that may not change, when what they may not see is exchanged."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
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
    found = dict(zip(("output", "query", "key", "value"), errors, strict=True))

    blind = torch.arange(tokens, device=device)  # tokens that see nothing of what is exchanged:
    last = tokens - tokens // 8  # the first document, and everything from here on
    blind = blind[(documents[0] > 0) & (blind < last)]
    changed = (documents[0] == 0) | (torch.arange(tokens, device=device) >= last)
    others = [torch.where(changed[:, None], x.flip(2) + 1, x) for x in (key, value)]
    seen = attention(query, *others, window, layout.mask(window))
    found["leak"] = float(((seen - out)[:, :, blind].abs().max() / out.abs().max()).detach())
    return found


@torch.inference_mode()
def decode_rows(findings: Findings) -> None:
    """A row a model and type of its weights."""
    device = findings.device
    for weights in ["fp32"] + (["bf16"] if device.type == "cuda" else []):
        for name, config in MODELS.items():
            about = {"model": name, "weights": weights}
            with findings.measuring(**about):
                found = decode_errors(device, config, weights)
                wrong = [key for key, error in found.items() if error is not None and not error <= WEIGHTS[weights]]
                findings.add({**about, **found, "holds": not wrong})
    if not captured.available(device):
        findings.skip("decode by CUDA graphs: there is no CUDA device")


def decode_errors(device: torch.device, config: ModelConfig, weights: str) -> dict[str, float | None]:
    """Norm of the difference from float64 over the logits' norm, the largest of all rows of each kind; `text`: how far
    a greedy choice is below the best logit, in units of the logits' deviation. `graphs`: None where there are none."""
    model = spread_out(config, rounded=weights == "bf16")
    exact = copy.deepcopy(model).double()
    model = model.to(device)
    model = for_decoding(model, "bf16") if weights == "bf16" else model
    ids = torch.randint(config.vocab_size, (len(PADDING), config.context), generator=torch.Generator().manual_seed(0))
    here, whole = ids.to(device), exact(ids)
    documents = torch.arange(config.context).expand_as(ids) * DOCUMENTS // config.context
    alone = [exact(ids[:, documents[0] == number]) for number in range(DOCUMENTS)]
    padded = [exact(row[None, pad:])[0] for row, pad in zip(ids, PADDING, strict=True)]
    state = model.new_state(len(ids))
    cached = torch.cat([model.step(part, state) for part in _cut(here)], dim=1)
    state = model.new_state(len(ids), torch.tensor(PADDING, device=device))
    beside = torch.cat([model.step(part, state) for part in _cut(here)], dim=1)
    return {
        "full": apart(model(here), whole),
        "packed": apart(model(here, documents.to(device)), torch.cat(alone, dim=1)),
        "cached": apart(cached, whole),
        "padded": max(apart(row[pad:], right) for row, pad, right in zip(beside, PADDING, padded, strict=True)),
        "text": max(_regret(exact, model, graphs) for graphs in {False, captured.available(device)}),
        "graphs": _by_graphs(model, here, whole) if captured.available(device) else None,
    }


def spread_out(config: ModelConfig, rounded: bool = False) -> nn.Module:
    """A model on the CPU whose attention is peaked and whose logits spread, so that a wrong key or position shows in
    them, as at initialisation it would not; `rounded`: to weights that are the same in bf16."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        elif name.endswith(("query.weight", "key.weight")):
            weight.mul_(2)
        elif "embedding" in name:
            weight.mul_(0.5 / weight.std())
        if rounded and weight.ndim > 1:
            weight.copy_(weight.bfloat16())
    signs = torch.randn(config.d_model, generator=generator).sign()  # without which it would echo its input
    model.final_norm.weight.mul_(signs / 3)
    return model.eval()


def apart(found: Tensor, exact: Tensor) -> float:
    """The largest norm of a row's difference [..., V], over the norm of the exact one."""
    difference = found.cpu().double() - exact.double()
    return float((difference.norm(dim=-1) / exact.double().norm(dim=-1)).max())


def _cut(ids: Tensor) -> tuple[Tensor, ...]:
    return ids.split([*CHUNKS, *[1] * (ids.shape[1] - sum(CHUNKS))], dim=1)


def _regret(exact: nn.Module, model: nn.Module, graphs: bool) -> float:
    """How far below the best one the full pass in float64 finds the tokens that `model` wrote."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = exact.config.vocab_size
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (9, 70, 33)]
    texts = generate(model, prompts, NEW, sampling=Sampling(temperature=0.0), graphs=graphs)
    worst = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        logits = exact(torch.tensor([prompt + text[:-1]]))[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        worst = max(worst, float(((logits.max(dim=1).values - chosen) / logits.std(dim=1)).max()))
    return worst


def _by_graphs(model: nn.Module, ids: Tensor, whole: Tensor) -> float:
    """Raises RuntimeError where there should be graphs and are none."""
    state, prompt = model.new_state(len(ids)), sum(CHUNKS)
    prefill(model, ids[:, :prompt], state)
    steps = CapturedSteps(model, state)
    logits = [steps(ids[:, place, None]).clone() for place in range(prompt, ids.shape[1])]
    if steps.failed:
        raise RuntimeError(f"no CUDA graphs: {steps.failed}")
    return apart(torch.cat(logits, dim=1), whole[:, prompt:])
