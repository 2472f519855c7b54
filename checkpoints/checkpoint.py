"""Saving and loading a run: one verified folder a checkpoint, `runs/<name>/checkpoints/step-00001200/`.

    model.safetensors      weights, fp32, by parameter name
    optimizer.safetensors  optimizer state, `<parameter>.<buffer>`
    state.json             RunState: where in the run this is
    model.json             ModelConfig
    config.yaml            the run's resolved config
    tokenizer/             as `transformers` loads it; it states the token that begins a text
    manifest.json          sha256 of all of these, written last (storage.folder)

A run that was stopped in a validation has a second checkpoint of that step, `step-00001200-later`, and one that was
stopped again in the phase's last one a third, `step-00001200-later-later`. Everything else, the data order and the
learning rate included, follows from the config and RunState.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from checkpoints import tensors
from models.config import ModelConfig
from storage import folder

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from torch import Tensor

    from tokenizer import Tokenizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MODEL_CONFIG, RUN_CONFIG, TOKENIZER = "model.json", "config.yaml", "tokenizer"
_NAME = re.compile(r"step-\d{8,}(?:-later)*")
_BROKEN = re.compile(r"\.(step-\d{8,}(?:-later)*)\.broken-\d+")  # storage.folder.set_aside
BESIDE_TENSORS = 32 * 2**20  # bytes: tokenizer, config and headers, and a little for whoever else writes
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
    samples_done: dict[str, int] = dataclasses.field(default_factory=dict)  # by phase that is done: samples consumed
    looked_up: int = 0  # the step whose validation and samples, if due, are made
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # by source: data.shards.digest
    seconds: float = 0.0  # spent training, over all sessions
    val_loss: float | None = None  # the last one of the current phase, nats a token
    best_val_loss: float | None = None  # of the current phase, for early stopping
    validations_without_gain: int = 0
    skipped: int = 0  # batches of the whole run whose loss or gradient was no number
    skipped_in_a_row: int = 0  # up to the last step
    loss_count: int = 0  # running mean of the current phase's training loss (training/stability.py): steps in it,
    loss_mean: float = 0.0  # the mean, older steps counting less, nats a token,
    loss_variance: float = 0.0  # and its variance
    special_tokens: list[int] | None = None  # that training documents hold so far; None: an older version wrote this

    @property
    def ends_phase(self) -> bool:
        """Whether this is the state right after a phase."""
        return self.cursor == 0 and bool(self.phases_done)

    @property
    def done_at_step(self) -> tuple[int, int]:
        """What tells the states of one step apart: whether its validation is made, whether its phase is over."""
        return int(self.looked_up == self.step), len(self.phases_done)

    @property
    def last_phase(self) -> int:
        """Number, from 0, of the phase that took the last step."""
        return len(self.phases_done) - self.ends_phase


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one has been written and verified. The newest always does."""

    newest: int = 3  # so many of the newest
    best: bool = True  # the one with the lowest validation loss of the newest one's phase
    phase_ends: bool = True  # those made at the end of a phase
    every_steps: int | None = None  # those of every so many steps

    def obsolete(self, root: Path, newest: Path) -> list[Path]:
        """The folders that may go, oldest first: checkpoints older than `newest`, and broken ones set aside that are
        older than all that stay."""
        older = [entry for entry in _folders(root) if entry.name < newest.name]
        states = {}
        for path in [*older, newest]:
            with contextlib.suppress(CheckpointError):  # a broken one is no milestone
                states[path] = read_state(path)
        kept = {newest, *older[max(0, len(older) - (self.newest - 1)) :]}
        for path, state in states.items():
            by_step = self.every_steps is not None and state.step % self.every_steps == 0
            if by_step or (self.phase_ends and state.ends_phase):
                kept.add(path)
        rivals = [path for path, state in states.items()
                  if state.val_loss is not None and state.last_phase == states[newest].last_phase]  # fmt: skip
        if self.best and rivals:
            kept.add(min(rivals, key=lambda path: (states[path].val_loss, path.name)))
        oldest = min(path.name for path in kept)
        broken = [entry for entry in root.iterdir() if (found := _BROKEN.fullmatch(entry.name)) and found[1] < oldest]
        return [path for path in older if path not in kept] + sorted(broken)


def save(
    root: Path,
    state: RunState,
    *,
    model: dict[str, "Tensor"],
    optimizer: dict[str, "Tensor"],
    model_config: ModelConfig,
    run_config: dict[str, Any],
    tokenizer: "Tokenizer",
    retention: Retention = Retention(),
) -> Path:
    """Write the checkpoint of `state.step` under `root`; when it verifies, remove older ones as `retention` says.

    A folder that is already there, from an earlier try, stays if it verifies and is set aside if it does not; if it
    holds another state of the same step, before its validation or its phase's end, the new one is called step-N-later
    (and one after that step-N-later-later). One of a later step, which the run could not resume from, does not count
    and stays until the run comes to that step. Called by one rank, of one run: what another try left half-written is
    cleared away.

    Raises:
        OSError: the disk is full, was too full to begin with (ENOSPC), or does not give back what was written (EIO).
            The older checkpoints are all still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = root / f"step-{state.step:08d}"
    while path.exists() and not folder.verify(path):
        if _is_of(path, state):
            return path
        path = path.with_name(f"{path.name}-later")
    if path.exists():
        folder.set_aside(path)
    folder.clear_all_leftovers(root)
    _check_room(root, path, [*model.values(), *optimizer.values()])
    with folder.write(path) as temporary:
        try:
            save_file(model, temporary / MODEL)
            save_file(optimizer, temporary / OPTIMIZER)
        except SafetensorError as error:  # which it makes of a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error
        (temporary / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1))
        (temporary / MODEL_CONFIG).write_text(json.dumps(dataclasses.asdict(model_config), indent=1))
        (temporary / RUN_CONFIG).write_text(yaml.safe_dump(run_config, sort_keys=False))
        tokenizer.save(temporary / TOKENIZER, begins=True)
    if problems := folder.verify(path):
        folder.set_aside(path)
        raise OSError(errno.EIO, f"the disk does not give back what was written ({'; '.join(problems)})", str(path))
    for old in retention.obsolete(root, path):
        folder.remove(old)
    return path


def _is_of(path: Path, state: RunState) -> bool:
    """Whether the checkpoint at `path` holds this state, whenever it was."""
    same = {"seconds": state.seconds, "special_tokens": state.special_tokens}
    return dataclasses.replace(read_state(path), **same) == state


def _check_room(root: Path, path: Path, tensors: list["Tensor"]) -> None:
    """Raises OSError if the disk has no room for a checkpoint of these tensors."""
    root.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors) + BESIDE_TENSORS
    free = shutil.disk_usage(root).free
    if free < needed:
        what = f"{needed / 1e9:.2f} GB are needed for a checkpoint, {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, what, str(path))


def newest(root: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint under `root` that verifies, and the newer ones that were skipped, with the reasons."""
    return folder.newest_verified(root, _NAME.pattern)  # not the copies that people keep beside them


def take_stock(root: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """What `newest` finds, for the run that goes on from it: what it skipped is set aside, where the disk allows, so
    that no broken checkpoint is kept in place of a good one, and what was left half-written is cleared away."""
    path, skipped = newest(root)
    with contextlib.suppress(OSError):  # a disk that cannot be written says so when it has to be
        folder.clear_all_leftovers(root)
        for broken, problems in skipped.items():
            problems.append(f"it is now {folder.set_aside(broken).name}")
    return path, skipped


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
    root = path if path.name == "checkpoints" else path / "checkpoints"
    found, skipped = newest(root)
    below = sorted(str(entry.parent) for entry in path.glob("*/checkpoints"))
    if found is None and below and not root.is_dir():
        raise CheckpointError(f"{path} is no run, but holds some: name one, for example {' or '.join(below[:3])}")
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
    try:
        config = yaml.safe_load((path / RUN_CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError("it has no sections")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unlike(path / RUN_CONFIG, error) from error
    return config


def read_weights(path: Path, place: Callable[[str, "Tensor"], "Tensor"] | None = None) -> dict[str, "Tensor"]:
    """Weights by parameter name, each where `place` (checkpoints.tensors.placing) puts it."""
    return _load_tensors(path / MODEL, place)


def read_optimizer(path: Path) -> dict[str, "Tensor"]:
    """Optimizer state by canonical name."""
    return _load_tensors(path / OPTIMIZER)


def _folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first; what else people keep there is left alone."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))


def _read_fields(path: Path, kind: type[T]) -> T:
    """The dataclass of `kind` that is stored as JSON at `path`."""
    import pydantic

    try:
        fields = json.loads(path.read_text())
        kind(**fields)  # which takes no key too many
        return _adapter(kind).validate_python(fields)
    except pydantic.ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise _unlike(path, ValueError("; ".join(faults))) from error
    except (OSError, ValueError, TypeError) as error:
        raise _unlike(path, error) from error


@functools.cache
def _adapter(kind: type) -> "TypeAdapter":
    """Made once: it takes longer than all that is read with it, and a save reads the state of every checkpoint."""
    import pydantic

    return pydantic.TypeAdapter(kind)


def _unlike(path: Path, error: Exception) -> CheckpointError:
    what = " ".join(str(error).split())
    return CheckpointError(f"{path} is not what this version writes ({what}): use another checkpoint, or mend it")


def _load_tensors(path: Path, place: Callable[[str, "Tensor"], "Tensor"] | None = None) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError

    try:
        return tensors.read(path, place)
    except (OSError, SafetensorError) as error:
        remedy = "weights are loaded from safetensors files only"
        raise CheckpointError(f"{path} cannot be read ({error}): {remedy}") from error
