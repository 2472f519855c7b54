"""Muon for the hidden matrices, AdamW for everything else: one optimizer, one file.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces each matrix's momentum by
the nearest orthogonal matrix, found by five Newton-Schulz steps: every direction of the update gets the same size.
Embeddings, the head, norms and biases take AdamW (Loshchilov & Hutter 2019). The learning rate is no state: the
trainer sets it at each step from the schedule. Matrices of one shape are orthogonalised together, in one batch.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from training.settings import OptimizerSection

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values towards 1
MOST_STACKED = 2**26  # elements orthogonalised in one batch: a big model's matrices together would fill the memory


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearly orthogonal matrices closest to `matrices` [n, rows, columns], computed in `dtype`."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on hidden matrices, AdamW on the rest, chosen once from the model's parameter names and shapes.

    Args:
        named_parameters: (name, parameter) pairs of the unwrapped model.
        muon_lr, adamw_lr: peak learning rates; `set_learning_rate` scales both by the schedule's multiplier. Without
            a `muon_lr`, hidden matrices take AdamW as well.
        weight_decay: decoupled, on matrices only (norms and biases have none).
        newton_schulz_dtype: float32 for reproducibility across machines, bfloat16 for speed on GPUs.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        muon_lr: float | None = 0.02,
        adamw_lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        newton_schulz_dtype: torch.dtype = torch.float32,
    ):
        muon, matrices, vectors = [], [], []
        self.names: dict[nn.Parameter, str] = {}
        for name, parameter in named_parameters:
            self.names[parameter] = name
            hidden_matrix = parameter.ndim == 2 and "embedding" not in name and "head" not in name.split(".")
            if hidden_matrix and muon_lr is not None:
                muon.append(parameter)
            else:
                (matrices if parameter.ndim >= 2 else vectors).append(parameter)
        adamw = {"kind": "adamw", "peak_lr": adamw_lr, "betas": betas, "eps": eps}
        groups = [
            {"kind": "muon", "peak_lr": muon_lr, "momentum": momentum, "weight_decay": weight_decay, "params": muon},
            {**adamw, "weight_decay": weight_decay, "params": matrices},
            {**adamw, "weight_decay": 0.0, "params": vectors},
        ]
        self.newton_schulz_dtype = newton_schulz_dtype
        device = next(iter(self.names)).device
        self.steps_taken = torch.zeros((), device=device)  # of AdamW's bias correction
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        self.set_learning_rate(1.0)

    @classmethod
    def of(cls, model: nn.Module, settings: "OptimizerSection") -> "MuonAdamW":
        """For `model`, on the device where it is, as the config says."""
        named = dict(model.named_parameters())
        on_cuda = next(iter(named.values())).device.type == "cuda"
        use_bf16 = settings.newton_schulz == "bf16" or (settings.newton_schulz == "auto" and on_cuda)
        return cls(
            named.items(),
            muon_lr=settings.muon_lr,
            adamw_lr=settings.adamw_lr,
            momentum=settings.momentum,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            newton_schulz_dtype=torch.bfloat16 if use_bf16 else torch.float32,
        )

    def set_learning_rate(self, multiplier: float) -> None:
        """Every group's learning rate becomes `multiplier` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * multiplier

    @torch.no_grad()
    def step(self, only_if: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient; none of anything where `only_if` [] bool is False.

        `only_if` is looked at where it stands: on a GPU nobody waits for it, and what must not happen is masked out.
        """
        if only_if is not None and only_if.device.type == "cpu":
            if only_if:
                self._update(None)
            return
        self._update(only_if)

    @torch.no_grad()
    def _update(self, only_if: Tensor | None) -> None:
        self.steps_taken += 1 if only_if is None else only_if.to(self.steps_taken)
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["kind"] == "muon":
                self._muon(group, with_gradient, only_if)
            else:
                self._adamw(group, with_gradient, only_if)

    def _muon(self, group: dict, parameters: list[nn.Parameter], only_if: Tensor | None) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for (rows, columns), same_shape in by_shape.items():
            at_once = max(1, MOST_STACKED // (rows * columns))
            for start in range(0, len(same_shape), at_once):
                self._muon_batch(group, same_shape[start : start + at_once], only_if)

    def _muon_batch(self, group: dict, parameters: list[nn.Parameter], only_if: Tensor | None) -> None:
        """Matrices of one shape."""
        rows, columns = parameters[0].shape
        gradients = [parameter.grad for parameter in parameters]
        buffers = [self._buffer(parameter, "momentum_buffer") for parameter in parameters]
        if only_if is not None:  # a momentum drawn towards itself stays what it is
            gradients = [torch.where(only_if, *pair) for pair in zip(gradients, buffers, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = newton_schulz(torch.stack(nesterov), dtype=self.newton_schulz_dtype)
        # a tall matrix needs a larger update for the same change of its output (Jordan et al. 2024)
        scale = max(1.0, rows / columns) ** 0.5
        lr = group["lr"] if only_if is None else group["lr"] * only_if
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.mul_(-lr * scale).unbind()))

    def _adamw(self, group: dict, parameters: list[nn.Parameter], only_if: Tensor | None) -> None:
        if not parameters:
            return
        # torch counts every parameter's steps; ours are counted once, for the whole model
        before = self.steps_taken - (1 if only_if is None else only_if.to(self.steps_taken))
        steps = before.to(parameters[0].device).repeat(len(parameters)).unbind()
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [self._buffer(parameter, "exp_avg") for parameter in parameters],
            [self._buffer(parameter, "exp_avg_sq") for parameter in parameters],
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=None if only_if is None else (~only_if).float(),
        )

    def _buffer(self, parameter: nn.Parameter, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by canonical name, `<parameter>.<buffer>`; what a checkpoint stores."""
        named = {f"{self.names[p]}.{key}": value for p, state in self.state.items() for key, value in state.items()}
        return {**named, "steps_taken": self.steps_taken.to(torch.int64)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave.

        Raises:
            KeyError: a name belongs to no parameter of this model.
        """
        by_name = {name: parameter for parameter, name in self.names.items()}
        self.state.clear()
        for key, value in tensors.items():
            if key == "steps_taken":
                self.steps_taken.copy_(value)
                continue
            name, _, buffer = key.rpartition(".")
            parameter = by_name[name]
            self.state[parameter][buffer] = value.to(device=parameter.device, dtype=parameter.dtype).clone()
