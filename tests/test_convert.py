"""Wrong calls of convert.py: a line that says what would be right, the exit code, and nothing left behind."""

import errno
import os
import shutil
import sys
from collections import namedtuple
from importlib import metadata

import pytest

import convert
from export import coreml, traced
from tests.export.checkpoint_of import save_checkpoint

RIGHT, FAILED, WRONG = 0, 1, 2
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run with one checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "x")


@pytest.fixture
def call(tmp_path, checkpoint, monkeypatch, capsys):
    """call(word, ...) -> exit code and the last line of what convert.py says, in a folder of its own; options given
    come after the right ones and win."""

    def call(*words):
        monkeypatch.chdir(tmp_path)
        right = ["--checkpoint", str(checkpoint), "--to", "coreml", "--out", "out"]
        monkeypatch.setattr(sys, "argv", ["convert.py", *right, *map(str, words)])
        try:
            code = convert.main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, (said.err or said.out).strip().splitlines()[-1]

    return call


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_right_call_for_comparison(call, tmp_path):
    code, said = call()
    assert code == RIGHT and said.startswith("Not checked here: that Core ML's compiler accepts the package;")
    assert left(tmp_path) == ["out"]


ARGUMENTS = {
    "--context 49": "--context 49: the model's own context is 48: use at most that",
    "--context 1": "convert.py: error: --context 1: use 2 or more",
    "--to onnx": "invalid choice: 'onnx'",
    "--io ring": "invalid choice: 'ring'",
    "--quantize int3": "invalid choice: 'int3'",
    "--hub me": "convert.py: error: --hub me: write OWNER/NAME",
    "--hub me --context 0": "--context 0: use 2 or more; --hub me: write OWNER/NAME",
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_wrong_arguments(call, tmp_path, words):
    code, said = call(*words.split())
    assert code == WRONG and ARGUMENTS[words] in said
    assert left(tmp_path) == []


def test_an_out_that_exists_or_lies_in_a_file(call, tmp_path):
    (tmp_path / "out").mkdir()
    assert call() == (WRONG, "convert.py: error: --out out exists already: name another, or remove it")
    (tmp_path / "file").write_text("mine")
    code, said = call("--out", "file/out")
    assert (code, said) == (WRONG, "convert.py: error: --out file/out lies in a file: name a folder")
    assert left(tmp_path) == ["file", "out"] and left(tmp_path / "out") == []


def test_no_checkpoint_and_a_damaged_one(call, tmp_path, checkpoint):
    code, said = call("--checkpoint", "nowhere")
    assert code == FAILED and "nowhere" in said
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    next(damaged.rglob("model.safetensors")).write_bytes(b"half")
    code, said = call("--checkpoint", damaged)
    assert code == FAILED and "model.safetensors" in said
    assert left(tmp_path) == ["damaged"]


def test_without_coremltools(call, tmp_path, monkeypatch):
    version = metadata.version

    def installed(name):
        if name == "coremltools":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", installed)
    code, said = call()
    assert code == WRONG
    assert said == "--to coreml: the package coremltools is not installed: pip install -r requirements.txt"
    assert left(tmp_path) == []


def test_no_room_on_the_disk(call, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1_000_000))
    code, said = call()
    assert code == FAILED and said.endswith("MB are needed and 1 MB are free: name another disk")
    assert left(tmp_path) == []


def test_a_disk_that_is_full_in_between(call, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(coreml.shutil, "copy", full)  # after the package
    assert call() == (FAILED, "--out out: No space left on device")
    assert left(tmp_path) == []


def test_a_package_that_computes_something_else_is_not_left(call, tmp_path, monkeypatch):
    positions = traced.TracedState.positions
    monkeypatch.setattr(traced.TracedState, "positions", lambda *given: positions(*given) // 2)
    code, said = call()
    assert code == FAILED and "the graph computes something else than the checkpoint: relative is" in said
    assert left(tmp_path) == []
