"""Peaks only for cards that are known by their whole name, memory that grows when memory is used, the environment."""

import json
import mmap
import subprocess

import pytest
import torch

from machine import hardware


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", 147.1),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_known_cards(name, teraflops):
    assert hardware.peak_flops(name, torch.bfloat16) == pytest.approx(teraflops * 1e12)
    assert hardware.peak_flops(name, "bf16") == hardware.peak_flops(name, torch.float16)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 3080",
        "NVIDIA A10G",
        "NVIDIA H100 NVL",
        "NVIDIA RTX 6000",
        "Quadro RTX 6000",
        "NVIDIA A1000",
        "AMD Instinct MI300X",
        "cpu",
        "",
    ],
)
def test_anything_else_has_no_peak(name):
    assert hardware.peak_flops(name, torch.bfloat16) is None


def test_a_precision_that_the_card_does_not_have_or_that_depends_on_settings_has_no_peak():
    assert hardware.peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) is None
    assert hardware.peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert hardware.peak_flops("Tesla V100-SXM2-16GB", torch.float16) == 125e12
    assert hardware.peak_flops("Tesla T4", "fp16") == 65e12


def test_utilization_counts_all_devices_and_is_unknown_without_a_peak():
    assert hardware.flops_utilization(1000.0, 6e9, 100e12) == pytest.approx(0.06)
    assert hardware.flops_utilization(1000.0, 6e9, 100e12, devices=2) == pytest.approx(0.03)
    assert hardware.flops_utilization(1000.0, 6e9, None) is None


def test_memory_in_use_sees_what_was_allocated():
    size = 64 * 2**20
    before = hardware.memory_in_use("cpu")
    with mmap.mmap(-1, size) as held:  # fresh pages: an allocator might hand out what it kept from earlier tests
        held.write(b"x" * size)
        assert hardware.memory_in_use("cpu") - before > 0.8 * size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_a_gpu_is_the_allocated_peak():
    torch.cuda.reset_peak_memory_stats()
    before = hardware.memory_in_use("cuda")
    held = torch.ones(64 * 2**20 // 4, device="cuda")
    size = held.nbytes
    del held
    assert hardware.memory_in_use("cuda") - before >= size


def test_environment_is_plain_and_names_what_matters():
    found = hardware.environment("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["device"] == "cpu"
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**20 and found["cpu"]


def test_commit_tells_changes_from_none(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True)

    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "observe" / "hardware.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert hardware.commit() is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = hardware.commit()
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert hardware.commit() == clean + "+changes"
