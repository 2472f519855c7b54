"""A checkpoint gives back bit by bit what was saved, and whatever cannot be trusted is refused by name."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import checkpoints
from checkpoints import CheckpointError, RunState, checkpoint, load_model
from models import ModelConfig, build_model
from storage import folder
from tokenizer import Tokenizer

SHAPE = ModelConfig(
    vocab_size=1024, context=32, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24, window=8, global_every=2
)
RUN_CONFIG = {"run": {"name": "x", "seed": 7}, "optimizer": {"clip": None}, "watch": {"wandb": "off"}}
WORDS = ["the quick brown fox jumps over the lazy dog"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(WORDS, 1024)


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in build_model(SHAPE, seed).state_dict().items()}


def optimizer_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.attention.q.momentum": torch.randn(3, 5, generator=generator),
        "embedding.second_moment": torch.full((2, 2), 1e-42),  # denormal
        "embedding.step": torch.tensor(seed, dtype=torch.int64),
        "norm.first_moment": torch.tensor([float("nan"), -0.0, float("inf")]),
        "low.momentum": torch.randn(4, generator=generator).bfloat16(),
    }


@pytest.fixture
def save(tokenizer, tmp_path):
    """save(step): a checkpoint whose weights and optimizer state are those of seed `step`."""

    def save(step: int, keep: int = 100, root: Path = tmp_path / "run" / "checkpoints", **changes) -> Path:
        parts = {
            "model": weights_of(step),
            "optimizer": optimizer_of(step),
            "model_config": SHAPE,
            "run_config": RUN_CONFIG,
            "tokenizer": tokenizer,
        }
        kept = checkpoint.Retention(newest=keep)
        return checkpoint.save(root, RunState(seed=7, step=step), retention=kept, **{**parts, **changes})

    return save


@pytest.fixture
def save_state(tokenizer):
    """save_state(state, root, retention): a checkpoint of that state, with some weights."""

    def save_state(state: RunState, root: Path, retention: checkpoint.Retention | None = None) -> Path:
        kept = retention or checkpoint.Retention(100)
        return checkpoint.save(root, state, model=weights_of(1), optimizer=optimizer_of(1), model_config=SHAPE,
                               run_config=RUN_CONFIG, tokenizer=tokenizer, retention=kept)  # fmt: skip

    return save_state


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Equal names, types, shapes and bits."""
    return ours.keys() == theirs.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- what is saved comes back


def test_all_of_a_run_comes_back(save, tokenizer, tmp_path):
    state = RunState(7, 12, 10**12, ["a", "b"], 345, {"a": 64, "b": 10**9}, 12, {"stories": "0f"}, 1.5, 0.1 + 0.2, 3.0,
                     4, 5, 6, 7, 0.1, 0.2, [0, 5])  # fmt: skip
    assert all(getattr(state, field.name) != getattr(RunState(1), field.name) for field in dataclasses.fields(state))
    path = checkpoint.save(
        tmp_path, state, model=weights_of(12), optimizer=optimizer_of(12), model_config=SHAPE, run_config=RUN_CONFIG,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert path == tmp_path / "step-00000012"
    assert folder.verify(path) == []
    assert checkpoint.read_state(path) == state
    assert checkpoint.read_state(save(3)) == RunState(seed=7, step=3)
    assert checkpoint.read_model_config(path) == SHAPE
    assert same(checkpoint.read_weights(path), weights_of(12))
    assert same(checkpoint.read_optimizer(path), optimizer_of(12))
    assert Tokenizer.load(path / checkpoint.TOKENIZER).fingerprint == tokenizer.fingerprint
    assert checkpoint.yaml.safe_load((path / checkpoint.RUN_CONFIG).read_text()) == RUN_CONFIG


def test_weights_are_no_code(save):
    path = save(1)
    files = sorted(str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file())
    known = {"config.yaml", "manifest.json", "model.json", "state.json", "model.safetensors", "optimizer.safetensors"}
    assert known < set(files)
    assert all(name.startswith("tokenizer/") and name.endswith((".json", ".jinja")) for name in set(files) - known)
    for name in files:
        with pytest.raises(Exception):  # noqa: B017, whatever a file is that is no pickle
            pickle.loads((path / name).read_bytes())
        assert not (path / name).read_bytes().startswith(b"PK")  # what torch.save writes


@pytest.mark.parametrize("as_text", [True, False])
def test_a_model_loads_from_a_run_and_from_a_checkpoint(save, tokenizer, tmp_path, as_text):
    paths = [save(step) for step in (1, 2)]
    ids = torch.arange(20).reshape(2, 10)
    for where, seed in (tmp_path / "run", 2), (paths[0], 1), (paths[1], 2):
        model, loaded, config = load_model(str(where) if as_text else where)
        assert config == SHAPE and not model.training
        assert same(dict(model.state_dict()), weights_of(seed))
        assert loaded.encode(WORDS[0]) == tokenizer.encode(WORDS[0])
        with torch.no_grad():
            assert torch.equal(model(ids), build_model(SHAPE, seed).eval()(ids))


# --- what cannot be trusted


def test_the_newest_that_verifies_is_taken(save, tmp_path):
    paths = [save(step) for step in (9, 10, 100)]
    flip(paths[2] / checkpoint.MODEL)
    found, skipped = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert found == paths[1] and list(skipped) == [paths[2]]
    assert checkpoint.MODEL in skipped[paths[2]][0]
    model, _, _ = load_model(tmp_path / "run")
    assert same(dict(model.state_dict()), weights_of(10))
    (paths[1] / folder.MANIFEST).unlink()
    model, _, _ = load_model(tmp_path / "run")
    assert same(dict(model.state_dict()), weights_of(9))


def test_a_checkpoint_that_was_named_is_not_replaced_by_another(save):
    for step, name in enumerate([checkpoint.MODEL, checkpoint.STATE, "tokenizer/tokenizer.json", folder.MANIFEST], 1):
        path = save(step)
        (path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"{path} cannot be used: {path / name}"):
            load_model(path)


def test_when_there_is_none_the_message_says_why(save, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder: name a run"):
        load_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no checkpoint that can be used .none was written yet"):
        load_model(tmp_path)
    path = save(1)
    with pytest.raises(CheckpointError, match=f"is no run, but holds some: name one, for example {tmp_path / 'run'}"):
        load_model(tmp_path)
    (path / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'run'} has no .*{path / checkpoint.STATE} is missing"):
        load_model(tmp_path / "run")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def disguised(path: Path, change) -> Path:
    """The checkpoint at `path` after `change`, with a manifest that agrees with it."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    (copy / folder.MANIFEST).unlink()
    change(copy)
    shutil.rmtree(path)
    with folder.write(path) as temporary:
        shutil.copytree(copy, temporary, dirs_exist_ok=True)
    shutil.rmtree(copy)
    return path


@pytest.mark.parametrize("dump", [lambda trap: pickle.dumps(trap), lambda trap: pickle.dumps({"model": trap}, 0), None])
@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_pickle_in_place_of_weights_is_never_opened(save, tmp_path, dump, with_manifest):
    trap = Trap(tmp_path / "sprung")

    def plant(path: Path) -> None:
        if dump is None:
            torch.save({"weight": trap}, path / checkpoint.MODEL)
        else:
            (path / checkpoint.MODEL).write_bytes(dump(trap))

    path = save(1)
    if with_manifest:
        disguised(path, plant)
    else:
        plant(path)
    with pytest.raises(CheckpointError, match=f"{path / checkpoint.MODEL}.*"):
        load_model(path)
    assert not trap.path.exists()
    with pytest.raises(CheckpointError, match="from safetensors files only"):
        checkpoint.read_weights(path)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_weights_cut_short_are_named_even_where_the_manifest_agrees(save, name):
    def cut(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-10])

    path = disguised(save(1), cut)
    read = checkpoint.read_weights if name == checkpoint.MODEL else checkpoint.read_optimizer
    with pytest.raises(CheckpointError, match=str(path / name)):
        read(path)


def test_a_link_in_place_of_weights_is_refused(save, tmp_path):
    path = save(1)
    outside = tmp_path / "outside.safetensors"
    (path / checkpoint.MODEL).rename(outside)
    (path / checkpoint.MODEL).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{path / checkpoint.MODEL} is not a file of its own, but a link"):
        load_model(path)


# --- which are kept


def test_as_many_as_wanted_are_kept(save, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for step in range(1, 8):
        save(step, keep=5)
        assert names(root) == [f"step-{n:08d}" for n in range(max(1, step - 4), step + 1)]
    save(8, keep=1)
    assert names(root) == ["step-00000008"]


def test_what_else_lies_there_stays(save, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    others = ["best", "a", "step-1", "step-00000001-copy", "zz", ".step-00000009.broken-1"]
    for name in others:
        (root / name).mkdir(parents=True)
    for step in (1, 2, 3):
        save(step, keep=1)
    assert names(root) == sorted([*others, "step-00000003"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_after_a_fall_back_the_new_one_is_never_the_one_that_goes(save, tmp_path, keep):
    """The run went back to step 100, because 200 was broken; what it then saves is older than that by name."""
    save(100)
    flip(save(200) / checkpoint.MODEL)
    for step in (110, 120, 130):
        path = save(step, keep=keep)
        assert checkpoints.newest(tmp_path / "run" / "checkpoints")[0] == path
    good = [f"step-{n:08d}" for n in (100, 110, 120, 130)][-keep:]
    assert names(tmp_path / "run" / "checkpoints") == [*good, "step-00000200"]


def test_a_step_that_was_saved_before(save, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    path = save(5)
    written_at = (path / folder.MANIFEST).stat().st_mtime_ns
    assert save(5) == path
    assert (path / folder.MANIFEST).stat().st_mtime_ns == written_at
    flip(path / checkpoint.OPTIMIZER)
    assert save(5) == path
    assert folder.verify(path) == []
    assert names(root) == [".step-00000005.broken-1", "step-00000005"]


def test_a_failed_save_leaves_the_others(save, tmp_path):
    class Full:
        def save(self, path: Path, begins: bool) -> None:
            raise OSError(28, "No space left on device")

    paths = [save(1), save(2)]
    with pytest.raises(OSError, match="No space"):
        save(3, keep=1, tokenizer=Full())
    assert names(tmp_path / "run" / "checkpoints") == [path.name for path in paths]
    assert checkpoints.newest(tmp_path / "run" / "checkpoints") == (paths[1], {})


def test_copies_that_people_keep_are_not_taken_for_the_newest(save, tmp_path):
    newest = save(2)
    shutil.copytree(save(1), newest.with_name("step-00000001.old"))
    shutil.copytree(save(1), newest.with_name("warm"))
    assert checkpoints.newest(newest.parent) == (newest, {})


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.json", "junk"), ("model.json", '{"depth": 2}'), ("model.json", '{"n_layers": "x"}'),
     ("model.json", "null"), ("model.json", '{"d_model": 32}'), ("tokenizer/tokenizer.json", "{}")],
)  # fmt: skip
def test_what_another_version_wrote_is_named(save, name, content):
    path = save(1)
    (path / name).write_text(content)
    manifest = {"files": {n: folder._describe(path / n) for n in folder._files(path) if n != folder.MANIFEST}}
    (path / folder.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=name):
        load_model(path)


def test_a_state_of_another_version_is_named(save):
    path = save(1)
    (path / "state.json").write_text('{"seed": 1, "epoch": 3}')
    with pytest.raises(CheckpointError, match=r"state\.json.*epoch"):
        checkpoint.read_state(path)


def test_a_full_disk_is_an_os_error(save, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(1)


def test_the_best_the_ends_of_phases_and_milestones_stay(save_state, tmp_path):
    def state(step, val_loss=None, phases=(), cursor=1):
        return RunState(seed=7, step=step, val_loss=val_loss, phases_done=list(phases), cursor=cursor)

    states = [
        state(1, 3.0), state(2, 1.5), state(3, 2.5), state(4, 2.4, ["a"], cursor=0), state(5, None, ["a"]),
        state(6, 9.0, ["a"]), state(7, 4.0, ["a"]), state(8, 5.0, ["a"]), state(9, 6.0, ["a"]), state(10, 6.0, ["a"]),
    ]  # fmt: skip
    cases = {
        checkpoint.Retention(2): [4, 7, 9, 10],  # 7 is the best of the phase that 10 is in
        checkpoint.Retention(2, best=False): [4, 9, 10],
        checkpoint.Retention(2, phase_ends=False): [7, 9, 10],
        checkpoint.Retention(1, best=False, phase_ends=False): [10],
        checkpoint.Retention(1, best=False, phase_ends=False, every_steps=3): [3, 6, 9, 10],
    }
    for number, (retention, expected) in enumerate(cases.items()):
        root = tmp_path / str(number)
        for one in states:
            save_state(one, root, retention)
        assert [int(name.split("-")[1]) for name in names(root)] == expected, retention


def test_the_same_step_at_the_end_of_its_phase_is_kept_beside(save_state, tmp_path):
    """Stopped in its validations, a run has two or three states at one step, and loses none."""
    states = [
        RunState(seed=7, step=8, cursor=128),
        RunState(seed=7, step=8, cursor=128, looked_up=8),
        RunState(seed=7, step=8, looked_up=8, phases_done=["a"]),
    ]
    name = "step-00000008"
    for number, state in enumerate(states):
        path = save_state(state, tmp_path)
        assert path.name == name and len(names(tmp_path)) == number + 1
        assert checkpoints.newest(tmp_path)[0] == path and checkpoint.read_state(path) == state
        assert save_state(dataclasses.replace(state, seconds=5.0), tmp_path) == path
        name += "-later"
    (path / "state.json").write_text("{}")
    assert checkpoints.newest(tmp_path)[0].name == "step-00000008-later"
    assert save_state(states[-1], tmp_path) == path and checkpoint.read_state(path) == states[-1]


def test_a_disk_without_room_is_told_before_anything_is_written(save_state, tmp_path, monkeypatch):
    first = save_state(RunState(seed=7, step=1), tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=checkpoint.BESIDE_TENSORS))
    with pytest.raises(OSError, match=r"GB are needed for a checkpoint, .* GB are free") as caught:
        save_state(RunState(seed=7, step=2), tmp_path, checkpoint.Retention(1))
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == [first.name] and folder.verify(first) == []


def test_old_ones_stay_until_the_new_one_was_read_back(save_state, tmp_path, monkeypatch):
    first = save_state(RunState(seed=7, step=1), tmp_path)
    verify = folder.verify
    monkeypatch.setattr(folder, "verify", lambda path: ["bits have turned"] if "002" in path.name else verify(path))
    with pytest.raises(OSError, match="does not give back what was written .bits have turned"):
        save_state(RunState(seed=7, step=2), tmp_path, checkpoint.Retention(1))
    assert checkpoints.newest(tmp_path)[0] == first


def test_what_a_kill_left_is_cleared_away(save_state, tmp_path):
    for name in (".tmp-step-00000001-0123abcd", ".tmp-step-00000007-89ab4567"):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
    save_state(RunState(seed=7, step=2), tmp_path)
    assert names(tmp_path) == ["step-00000002"]
