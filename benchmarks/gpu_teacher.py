"""How fast the local teacher writes on this card: python -m benchmarks.gpu_suite --only teacher --json FILE

A model of Qwen3-4B's shape with random bf16 weights, made on the device, continues prompts of some 100 tokens by 200:
tokens/s and peak memory for several batch sizes, step by step and by CUDA graphs, and at last with compiled blocks in
the graphs. The same batch twice has to give the same ids; the graphs' logits have to be those of the plain steps, token
after token. Needs torch alone.
"""

import time
import warnings

import torch

from benchmarks.device import Findings, Row, at_most, wait
from models import ModelConfig, build_model
from models.compilation import compile_recorded_steps
from models.inference.captured import TOLERANCE_ELSE, CapturedSteps
from models.inference.decoding import generate, prefill
from models.inference.ready import for_decoding
from models.inference.sampling import Sampling

QWEN3_4B = ModelConfig(
    vocab_size=151_936, context=1024, n_layers=36, d_model=2560, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=9728,
    qk_norm=True, tied_head=True, window=None, global_every=None, rope_base_global=5e6,
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=1024, context=512, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, qk_norm=True,
    tied_head=True, window=None, global_every=None,
)  # fmt: skip
PROMPT, NEW = (80, 120), (200, 20)  # tokens: fewest and most; on a GPU and on the CPU
BATCHES = {"cuda": (32, 64, 96), "cpu": (2, 3)}
COMPILED_BATCH = 64
CHECKED = 180  # tokens after the shortest prompt: they pass a multiple of models.inference.captured.SPAN
SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20)  # what Qwen3-4B-Instruct-2507 asks for
MOST_SECONDS = 190  # of the whole section; the compiler, which nobody can promise for, has what is left of them


def teacher_rows(findings: Findings) -> None:
    """A row a batch size and way to decode."""
    device, began, model = findings.device, time.monotonic(), None
    cuda = device.type == "cuda"
    config = QWEN3_4B if cuda else TINY
    with findings.measuring(teacher="weights"):
        model = for_decoding(random_model(config, device), "bf16")
    if model is None:
        return

    def measure(batch: int, steps: str) -> None:
        about = {"batch": batch, "steps": steps}
        with findings.measuring(**about):
            findings.add({**about, **teacher_row(device, model, batch, steps)})

    for batch in BATCHES[device.type]:
        for steps in ("plain", "graphs") if cuda else ("plain",):
            measure(batch, steps)
    if not cuda:
        findings.skip("CUDA graphs and compiled steps of the teacher: there is no CUDA device")
        return
    left = min(MOST_SECONDS - (time.monotonic() - began), findings.left())
    with at_most(left, f"steps compiled, batch {COMPILED_BATCH}", findings):
        compile_recorded_steps(model)
        measure(COMPILED_BATCH, "compiled, graphs")


def teacher_row(device: torch.device, model: torch.nn.Module, batch: int, steps: str) -> Row:
    """One batch, written twice."""
    cuda, graphs = device.type == "cuda", "graphs" in steps
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(PROMPT[0], PROMPT[1] + 1, (batch,), generator=generator).tolist()
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    new = NEW[0] if cuda else NEW[1]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, texts = [], []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            wait(device)
            began = time.perf_counter()
            texts.append(generate(model, prompts, new, sampling=SAMPLING, seeds=range(batch), graphs=graphs))
            wait(device)
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        error = graph_error(device, model, prompts) if graphs else None
    fallback = "; ".join(str(warning.message) for warning in told if "graphs" in str(warning.message))
    same = texts[0] == texts[1]
    written = sum(map(len, texts[1]))
    return {
        "tokens_per_second": written / seconds[1],
        "ms_per_step": 1000 * seconds[1] / new,
        "first_seconds": seconds[0],
        "seconds": seconds[1],
        "peak_memory": peak,
        "ids": "equal" if same else "differ",
        "graph_error": error,
        **({"fallback": fallback[:200]} if fallback else {}),
        "holds": same and written == batch * new and not fallback and (error is None or error <= TOLERANCE_ELSE),
    }


@torch.inference_mode()
def graph_error(device: torch.device, model: torch.nn.Module, prompts: list[list[int]]) -> float:
    """Norm of the difference between the logits of recorded and plain steps, over that of the plain ones: the largest
    of some tokens that both are given."""
    shortest = min(map(len, prompts))
    ids = torch.tensor([prompt[:shortest] for prompt in prompts], device=device)
    states = [model.new_state(len(prompts), length=shortest + CHECKED) for _ in range(2)]
    for state in states:
        prefill(model, ids, state)
    recorded, largest = CapturedSteps(model, states[1]), torch.zeros((), device=device)
    for place in range(CHECKED):
        token = (ids[:, place % shortest, None] + place) % model.config.vocab_size
        plain, found = model.step(token, states[0]).float(), recorded(token).float()
        largest = torch.maximum(largest, (found - plain).norm() / plain.norm())
    return float(largest)


def random_model(config: ModelConfig, device: torch.device) -> torch.nn.Module:
    """A model whose weights never were anywhere but on `device`: matrices bf16, norms fp32, as a loaded teacher's."""
    model = build_model(config, device="meta")
    generator = torch.Generator(device).manual_seed(0)

    def made(name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device)
        weight = torch.empty(shape, device=device, dtype=torch.bfloat16)
        return weight.normal_(0, shape[1] ** -0.5, generator=generator)

    weights = {name: made(name, parameter.shape) for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    model.compute_tables("cpu")
    return model.to(device).eval()
