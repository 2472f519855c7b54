"""A process of test_distributed.py: builds a model on the meta device, shards it over all processes, initialises it,
and has rank 0 write the whole of every parameter. Usage: torchrun ... sharded_start.py FILE"""

import sys

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from machine import process
from models import ModelConfig, build_model

CONFIG = ModelConfig(
    vocab_size=2500, context=32, n_layers=2, d_model=33, n_heads=3, n_kv_heads=1, head_dim=6, d_ff=1027, copy_init=1.5,
    norm="layer", bias=True, tied_head=False, window=8, global_every=2,
)  # fmt: skip


def main() -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = build_model(CONFIG, device="meta")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.initialise(seed=7)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.6 * CONFIG.parameters()["total"], "every rank holds everything"
    whole = {name: parameter.full_tensor().contiguous() for name, parameter in model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        save_file(whole, sys.argv[1])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    process.leave(0)  # the shards hold on to their process group
