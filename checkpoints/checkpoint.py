"""Saving and loading a run: one verified folder a checkpoint, `runs/<name>/checkpoints/step-00001200/`.

    model.safetensors      weights, fp32, by parameter name
    optimizer.safetensors  optimizer state, `<parameter>.<buffer>`
    state.json             RunState: where in the run this is
    model.json             ModelConfig
    config.yaml            the run's resolved config
    tokenizer/             as `transformers` loads it
    manifest.json          sha256 of all of these, written last (storage.folder)

Everything else, the data order and the learning rate included, follows from the config and RunState.
"""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from models.config import ModelConfig
from storage import folder

if TYPE_CHECKING:
    from torch import Tensor

    from tokenizer import Tokenizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MODEL_CONFIG, RUN_CONFIG, TOKENIZER = "model.json", "config.yaml", "tokenizer"
_NAME = re.compile(r"step-\d{8,}")
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """No checkpoint that can be used; the message names the folder and what is wrong with it."""


@dataclasses.dataclass
class RunState:
    """Where a run is. Data order, learning rate and masks are functions of this and the config."""

    seed: int
    step: int = 0  # optimizer steps of the whole run
    tokens: int = 0  # trained tokens of the whole run
    phases_done: list[str] = dataclasses.field(default_factory=list)  # names; the current phase is the one after them
    cursor: int = 0  # samples consumed of the current phase
    seconds: float = 0.0  # spent training, over all sessions
    best_val_loss: float | None = None  # of the current phase, for early stopping
    validations_without_gain: int = 0


def save(
    root: Path,
    state: RunState,
    *,
    model: dict[str, "Tensor"],
    optimizer: dict[str, "Tensor"],
    model_config: ModelConfig,
    run_config: dict[str, Any],
    tokenizer: "Tokenizer",
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step` under `root`, and remove older ones until `keep` are left.

    A folder that is already there, from an earlier try, stays if it verifies and is set aside if it does not. One of
    a later step, which the run could not resume from, does not count and stays until the run comes to that step. Called
    by one rank.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = root / f"step-{state.step:08d}"
    if path.exists():
        if not folder.verify(path):
            return path
        folder.set_aside(path)
    with folder.write(path) as temporary:
        try:
            save_file(model, temporary / MODEL)
            save_file(optimizer, temporary / OPTIMIZER)
        except SafetensorError as error:  # which it makes of a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error
        (temporary / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1))
        (temporary / MODEL_CONFIG).write_text(json.dumps(dataclasses.asdict(model_config), indent=1))
        (temporary / RUN_CONFIG).write_text(yaml.safe_dump(run_config, sort_keys=False))
        tokenizer.save(temporary / TOKENIZER)
    older = [entry for entry in _folders(root) if entry.name < path.name]
    for old in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(old)
    return path


def newest(root: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint under `root` that verifies, and the newer ones that were skipped, with the reasons."""
    return folder.newest_verified(root, _NAME.pattern)  # not the copies that people keep beside them


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest verified one of a run's folder.

    Raises:
        CheckpointError: there is none, or it does not verify.
    """
    path = Path(path)
    if (path / MODEL_CONFIG).exists() or (path / folder.MANIFEST).exists():
        if problems := folder.verify(path):
            raise CheckpointError(f"{path} cannot be used: {'; '.join(problems)}")
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name a run (runs/x) or one of its checkpoints")
    found, skipped = newest(path / "checkpoints")
    if found is None:
        faults = "; ".join(problem for problems in skipped.values() for problem in problems)
        raise CheckpointError(f"{path} has no checkpoint that can be used ({faults or 'none was written yet'})")
    return found


def read_state(path: Path) -> RunState:
    """The RunState of the checkpoint at `path`."""
    return _read_fields(path / STATE, RunState)


def read_model_config(path: Path) -> ModelConfig:
    """The ModelConfig of the checkpoint at `path`."""
    return _read_fields(path / MODEL_CONFIG, ModelConfig)


def read_run_config(path: Path) -> dict[str, Any]:
    """The resolved config of the run that wrote the checkpoint at `path`."""
    return yaml.safe_load((path / RUN_CONFIG).read_text())


def read_weights(path: Path) -> dict[str, "Tensor"]:
    """Weights by parameter name."""
    return _load_tensors(path / MODEL)


def read_optimizer(path: Path) -> dict[str, "Tensor"]:
    """Optimizer state by canonical name."""
    return _load_tensors(path / OPTIMIZER)


def _folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first; what else people keep there is left alone."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))


def _read_fields(path: Path, kind: type[T]) -> T:
    """The dataclass of `kind` that is stored as JSON at `path`."""
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:  # a key too many is a TypeError
        raise CheckpointError(f"{path} is not what this version writes ({error})") from error


def _load_tensors(path: Path) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        remedy = "weights are loaded from safetensors files only"
        raise CheckpointError(f"{path} cannot be read ({error}): {remedy}") from error
