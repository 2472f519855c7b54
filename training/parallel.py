"""Where and how the run computes: device, processes, precision, and the wrapper that keeps ranks in step.

The trainer knows only `Strategy`. Plain (one process) and DDP (gloo on CPU, NCCL on CUDA) go through accelerate;
sharded strategies will be further subclasses. What `accelerate config` left in the environment about precision,
accumulation or backend does not count: the run's config decides, and a clash is reported.
"""

import contextlib
import datetime
import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from machine.process import usable_cores
from machine.rendezvous import meet
from models.compilation import compile_blocks
from training.settings import ParallelSection

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # of processes that wait for one; should it die, they are told at once


class LaunchError(RuntimeError):
    """The processes that were started are not those that the run expects; the message names the way out."""


class Strategy:
    """One process, or several with DDP. Every method is called by all ranks."""

    def __init__(self, section: ParallelSection, stop: Callable[[], bool] = lambda: False):
        """
        Args:
            stop: whether this process has been asked to stop; looked at while it waits for the others to start.

        Raises:
            LaunchError: fewer or more processes than expected, or ranks that do not know of each other.
            machine.rendezvous.Missing: not all of them have come within `parallel.launch_minutes`.
            KeyboardInterrupt: asked to stop before they had.
        """
        self.section = section
        self.notices = _clear_accelerate_environment(section)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        device = _device_type(section.device)
        _check_process_count(section, launched, device)
        self._store = meet(section.launch_minutes, stop, remedy="start what is missing, look at its output, or raise "
                           f"parallel.launch_minutes={section.launch_minutes:g}")  # fmt: skip
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        timeout = datetime.timedelta(minutes=section.timeout_minutes)
        backend = "nccl" if device == "cuda" else "gloo"
        handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if launched > 1 else []
        os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu")
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=handlers)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.world != launched:
            raise LaunchError(
                f"{launched} processes were started, but this one knows of {self.world}: they would train "
                f"independently. On CPU start them with: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
                f"--num_processes {launched} multigpu_train.py"
            )
        if self.device.type != device:
            raise LaunchError(f"parallel.device is {device}, but this process has only {self.device.type}: check the "
                              "driver and which torch is installed, or set parallel.device=auto")  # fmt: skip
        if device == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
            torch.set_num_threads(section.cpu_threads or max(1, usable_cores() // local))
        elif device == "cuda":
            torch.set_float32_matmul_precision("high")
        beside_nccl = launched > 1 and backend == "nccl"
        self._hosts = torch.distributed.new_group(backend="gloo", timeout=timeout) if beside_nccl else None
        self._patient = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if launched > 1 else None
        self.dtype = _compute_dtype(section.precision, self.device)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    @property
    def is_first_of_machine(self) -> bool:
        """Whether this rank does, for its machine, what concerns a disk."""
        return self.accelerator.is_local_main_process

    def prepare(self, objective: nn.Module) -> nn.Module:
        """The objective on its device, compiled and wrapped as the config says; call this one to train."""
        objective.to(self.device)
        if self.section.compile:
            compile_blocks(objective.model)
        if self.world == 1:
            return objective
        wrapper = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # torch 2.13's name for it
        return wrapper(
            objective,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # every rank has the same tables
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision in which the model computes; weights stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def micro_batch(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around one micro-batch's forward and backward: gradients are exchanged only with the last one's."""
        with contextlib.ExitStack() as stack:
            if not last and self.world > 1:
                stack.enter_context(module.no_sync())
            yield

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        """Gradients of the global mean loss: DDP averages over ranks, hence the factor.

        A loss that is no number makes all of its gradients none, so that every rank sees it in the gradient's norm.
        """
        (loss_sum * (self.world / global_tokens + 0 * loss_sum.detach())).backward()

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        """Scale gradients to a global norm of at most `max_norm`; returns the norm before."""
        limit = max_norm if max_norm is not None else float("inf")
        return nn.utils.clip_grad_norm_(module.parameters(), limit, foreach=True)

    def sum(self, *values: float | Tensor, patiently: bool = False) -> list[float]:
        """Each value summed over all ranks, in float64. A flag that any rank raises is above 0 on all of them.

        Numbers travel between the hosts' processors, so that a step that sums them does not wait for its GPU.
        `patiently`: wait for a rank that has hours of work to do first.
        """
        numbers = [float(value) for value in values]
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        if patiently:
            work = torch.distributed.all_reduce(total, group=self._patient, async_op=True)
            while not work.is_completed():  # in Python, where signals are heard meanwhile
                time.sleep(0.05)
            work.wait()
        else:
            torch.distributed.all_reduce(total, group=self._hosts)
        return total.tolist()

    def from_main(self, value: T) -> T:
        """The main process's `value`, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, group=self._hosts)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier(group=self._hosts)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's weights by canonical name, whole, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}

    def load_state(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Take weights by canonical name."""
        model.load_state_dict(tensors)

    def close(self) -> None:
        """Leave the process group."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _device_type(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_process_count(section: ParallelSection, launched: int, device: str) -> None:
    expected = section.processes
    if expected == "auto":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = torch.cuda.device_count() if device == "cuda" else 1
        if local >= gpus:
            return
        expected = gpus
        reason = f"this machine has {gpus} GPUs"
    else:
        reason = f"parallel.processes is {expected}"
    if launched == expected:
        if section.strategy == "plain" and launched > 1:
            raise LaunchError(f"parallel.strategy is plain, but {launched} processes were started: use ddp or auto")
        return
    launcher = "accelerate launch" if device == "cuda" else "ACCELERATE_USE_CPU=true accelerate launch"
    several = "--multi_gpu " if expected > 1 else ""
    raise LaunchError(
        f"{launched} process{'es' if launched != 1 else ''} started, but {reason}: start {expected} with "
        f"`{launcher} {several}--num_processes {expected} multigpu_train.py` or set parallel.processes={launched}"
    )


def _compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _clear_accelerate_environment(section: ParallelSection) -> list[str]:
    """Take out of the environment what `accelerate config` says about things that the run's config decides.

    Returns one line for each setting that clashes.
    """
    notices = []
    for variable, harmless, decided_by in (
        ("ACCELERATE_MIXED_PRECISION", {"no", section.precision}, f"parallel.precision={section.precision}"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", {"1"}, "each phase's batch_tokens and micro_batch"),
        ("ACCELERATE_DYNAMO_BACKEND", {"no"}, f"parallel.compile={str(section.compile).lower()}"),
        ("ACCELERATE_USE_DEEPSPEED", {"false"}, f"parallel.strategy={section.strategy}"),
        ("ACCELERATE_USE_FSDP", {"false"}, f"parallel.strategy={section.strategy}"),
    ):
        value = os.environ.pop(variable, None)
        if value is not None and value.lower() not in harmless:
            notices.append(f"accelerate's config says {variable}={value}; this run's config decides: {decided_by}")
    return notices
