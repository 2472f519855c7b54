"""What the run runs on: memory in use, the peak rate of the card for MFU, and the environment for reports.

An MFU is only shown where it is right: a card, a part of a card (MIG) or a precision that is not in the table below
has no peak, and a run on it has no MFU.
"""

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import process

# Peak FLOP/s of one card in bf16 and fp16 matrix products, in units of 1e12: dense (data sheets that print the rate
# "with sparsity" print twice this) and with fp32 accumulation, which is what PyTorch does (GeForce cards do it at
# half the rate that they are advertised with, GeForce fp16 sums; the professional cards of the same chips do not).
# Figures as NVIDIA's data sheets (A, B, H, L, T and V series) and the appendices of its GA102, Ada and RTX Blackwell
# architecture whitepapers (the RTX cards) give them; for A, H, L and RTX they equal SMs x FLOP per clock and SM x boost
# clock: 512 a GeForce and the L40, 1024 the other cards of the same chips, 2048 A100 and A30, 4096 H100.
# The key is the whole name that PyTorch gives, without maker, series and memory size: "A100" must not match "A10",
# nor "RTX 4090" the "RTX 4090 Laptop GPU". Left out: cards with two versions of one name (RTX 3080), and those whose
# dense rate two sources do not agree on (A10G, H100 NVL, H200 NVL).
_PEAK_TERAFLOPS = {
    "a10": 125.0,
    "a30": 165.0,
    "a40": 149.7,
    "a100 sxm4": 312.0,
    "a100 sxm": 312.0,
    "a100 pcie": 312.0,
    "b200": 2250.0,
    "gh200": 989.4,
    "h100 hbm3": 989.4,  # the SXM card: "NVIDIA H100 80GB HBM3"
    "h100 sxm5": 989.4,
    "h100 pcie": 756.0,
    "h200": 989.4,
    "l4": 121.0,
    "l40": 181.05,
    "l40s": 362.05,
    "rtx a5000": 111.1,
    "rtx a6000": 154.8,
    "rtx 6000 ada": 364.2,
    "rtx 3080 ti": 68.2,
    "rtx 3090": 71.0,
    "rtx 3090 ti": 80.0,
    "rtx 4070 ti": 80.2,
    "rtx 4080": 97.5,
    "rtx 4080 super": 104.4,
    "rtx 4090": 165.2,
    "rtx 4090 d": 147.1,
    "rtx 5080": 112.6,
    "rtx 5090": 209.5,
}
# Cards whose tensor cores know fp16 but not bf16.
_PEAK_TERAFLOPS_FP16_ONLY = {"t4": 65.0, "v100 pcie": 112.0, "v100 sxm2": 125.0, "v100s pcie": 130.0}

_NOISE = re.compile(r"\b(nvidia|geforce|tesla|graphics|generation|\d+\s?gb)\b")


def peak_flops(device_name: str, dtype: Any) -> float | None:
    """Peak FLOP/s of one card in dense matrix products, or None when it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the products: a torch dtype or its name. Only bfloat16 and float16 have a rate; float32 has none,
            because it depends on whether TF32 is allowed.
    """
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(name := str(dtype).removeprefix("torch."), name)
    card = " ".join(_NOISE.sub(" ", device_name.lower().replace("-", " ")).split())
    teraflops = None
    if precision in ("bf16", "fp16"):
        teraflops = _PEAK_TERAFLOPS.get(card)
    if precision == "fp16" and teraflops is None:
        teraflops = _PEAK_TERAFLOPS_FP16_ONLY.get(card)
    return None if teraflops is None else teraflops * 1e12


def flops_utilization(
    tokens_per_second: float, flops_per_token: float, peak: float | None, devices: int = 1
) -> float | None:
    """MFU (Chowdhery et al. 2022, "PaLM", appendix B): useful FLOP/s over the peak of all devices; None if unknown.

    Args:
        tokens_per_second: of the whole run, all devices.
        flops_per_token: forward and backward pass, without recomputed activations.
        peak: FLOP/s of one device, from `peak_flops`.
    """
    return None if not peak else tokens_per_second * flops_per_token / (peak * devices)


def memory_in_use(device: Any = "cpu") -> int:
    """Bytes: the peak that PyTorch allocated on a CUDA device, the driver's count on MPS, else this process's RSS."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        import torch

        return torch.mps.driver_allocated_memory()
    import psutil

    return psutil.Process().memory_info().rss


def environment(device: Any = None) -> dict[str, Any]:
    """Software, hardware and commit, as plain values for reports and benchmark files.

    Args:
        device: the one that is used; None for the first CUDA device if there is one, else the CPU.
    """
    import psutil
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": process.usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "commit": commit(),
        "command": " ".join(Path(part).name if place == 0 else part for place, part in enumerate(sys.argv)),
    }
    on_cuda = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    if on_cuda:
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_bytes"] = properties.total_memory
        found["devices"] = torch.cuda.device_count()
    else:
        found["device"] = "cpu" if device is None else str(device)
    return found


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # only Linux has the file
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this code, with "+changes" when files differ from it, results apart; None outside a
    repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        state = [
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True)
            for command in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results"),
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return state[0].stdout.strip() + ("+changes" if state[1].stdout.strip() else "")
