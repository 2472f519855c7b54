"""A written folder is there whole or not at all, is never overwritten, and shows every later change."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage import folder

ROOT = Path(__file__).resolve().parents[2]
CONTENT = {"a.bin": b"\x00" * 100_000, "deep/b.txt": b"some text", "deep/er/c": b"", "manifest.txt": b"no manifest"}


def fill(temporary: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(data)


def written(path: Path, content: dict[str, bytes] = CONTENT) -> Path:
    with folder.write(path) as temporary:
        fill(temporary, content)
    return path


def content_of(path: Path) -> dict[str, bytes]:
    return {str(entry.relative_to(path)): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}


# --- writing


def test_a_written_folder_holds_what_was_put_there_and_verifies(tmp_path):
    path = written(tmp_path / "made/on/the/way")
    found = content_of(path)
    manifest = json.loads(found.pop(folder.MANIFEST))
    assert found == CONTENT
    assert manifest["files"]["a.bin"] == {"size": 100_000, "sha256": folder.sha256(path / "a.bin")}
    assert folder.verify(path) == []
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_nothing_is_seen_before_the_end(tmp_path):
    path = tmp_path / "x"
    with folder.write(path) as temporary:
        fill(temporary)
        assert not path.exists()
        assert temporary.parent == tmp_path  # the same file system, so that the rename is one step
        assert folder.newest_verified(tmp_path) == (None, {})
    assert path.is_dir() and not temporary.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), folder.write(tmp_path / "x") as temporary:
        fill(temporary)
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["fsync", "rename"])
def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch, fault):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), folder.write(tmp_path / "x") as temporary:
        fill(temporary)
        monkeypatch.setattr(*((os, "fsync") if fault == "fsync" else (Path, "rename")), fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["whole", "empty", "file"])
def test_what_is_there_is_never_overwritten(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "whole":
        written(path)
    elif kind == "empty":
        path.mkdir()
    else:
        path.write_bytes(b"mine")
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match="x exists already"), folder.write(path) as temporary:
        fill(temporary, {"other": b"1"})
    assert content_of(tmp_path) == before


def test_a_folder_that_came_up_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(OSError), folder.write(path) as temporary:
        fill(temporary, {"late": b"1"})
        path.mkdir()
        fill(path, {"early": b"2"})
    assert content_of(tmp_path) == {"x/early": b"2"}


def test_only_files_of_its_own_can_be_written(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"1")
    with pytest.raises(ValueError, match="link.bin is a link"), folder.write(tmp_path / "x") as temporary:
        (temporary / "link.bin").symlink_to(outside)
    with pytest.raises(ValueError, match=r"x/manifest\.json is written by"), folder.write(tmp_path / "x") as temporary:
        fill(temporary, {folder.MANIFEST: b"{}"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["outside"]


# --- killed

# Kills itself at the Nth call of one of the functions that writing is made of, before or after it does its work.
KILLED = """
import os, signal, sys
from pathlib import Path
from storage import folder

point, number, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def deadly(function, after):
    calls = 0
    def call(*arguments):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if calls == number and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

when, _, name = point.partition(" ")
if name == "fsync":
    os.fsync = deadly(os.fsync, when == "after")
elif name == "rename":
    Path.rename = deadly(Path.rename, when == "after")
with folder.write(path) as temporary:
    (temporary / "a.bin").write_bytes(bytes(100_000))
    (temporary / "deep").mkdir()
    if name == "block":
        os.kill(os.getpid(), signal.SIGKILL)
    (temporary / "deep/b.txt").write_bytes(b"some text")
"""

# fsyncs: two files, the manifest, the manifest's folder, two folders, the parent; renames: the manifest, the folder
POINTS = [("in block", 1), *(("before fsync", n) for n in (1, 2, 3, 4, 6, 7)), ("after fsync", 7)]
POINTS += [(f"{when} rename", n) for when in ("before", "after") for n in (1, 2)]
VISIBLE = {("before fsync", 7), ("after fsync", 7), ("after rename", 2)}


def test_a_kill_at_any_instant_leaves_nothing_or_a_whole_folder(tmp_path):
    children = {
        (point, number): subprocess.Popen(
            [sys.executable, "-c", KILLED, point, str(number), str(tmp_path / f"{point}-{number}" / "x")], cwd=ROOT
        )
        for point, number in POINTS
    }
    for (point, number), child in children.items():
        assert child.wait(60) == -signal.SIGKILL, (point, number)
        root = tmp_path / f"{point}-{number}"
        path = root / "x"
        visible = (point, number) in VISIBLE
        assert path.exists() == visible, (point, number)
        assert folder.newest_verified(root) == (path if visible else None, {})
        assert len(list(root.iterdir())) == 1  # the folder, or what the kill left of it
        if not visible:
            written(path)
        assert folder.verify(path) == []
        assert [entry.name for entry in root.iterdir()] == ["x"], "the next write clears what was left behind"


def test_leftovers_of_a_file_go_with_its_next_write(tmp_path):
    for name in (".tmp-a.json-01234567", ".tmp-a.json-b-01234567", ".tmp-b.json-01234567"):
        (tmp_path / name).write_text("half")
    folder.write_file(tmp_path / "a.json", "{}")
    left = {".tmp-a.json-b-01234567", ".tmp-b.json-01234567"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *left}


def test_leftovers_of_other_folders_stay(tmp_path):
    others = [".tmp-x-y-0123abcd", ".tmp-xx-0123abcd", ".tmp-x-notes", "x-0123abcd", ".x-0123abcd"]
    for name in [".tmp-x-0123abcd", ".tmp-x-89abcdef", *others]:
        fill(tmp_path / name)
    folder.clear_leftovers(tmp_path / "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(others)


def test_names_with_pattern_characters(tmp_path):
    fill(tmp_path / ".tmp-[a]*-0123abcd")
    written(tmp_path / "[a]*")
    assert [entry.name for entry in tmp_path.iterdir()] == ["[a]*"]


# --- one file


def test_write_file(tmp_path):
    path = tmp_path / "f"
    folder.write_file(path, "häuser\n")
    assert path.read_bytes() == "häuser\n".encode()
    folder.write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["fsync", "rename", "data"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, fault):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    path = tmp_path / "f"
    folder.write_file(path, "old")
    if fault != "data":
        monkeypatch.setattr(*((os, "fsync") if fault == "fsync" else (Path, "rename")), fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        folder.write_file(path, "half a surrogate pair: \ud800" if fault == "data" else "new")
    assert content_of(tmp_path) == {"f": b"old"}


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from storage import folder
point, path = sys.argv[1:]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename"), "parent": (folder, "_fsync")}[point], die)
folder.write_file(path, "new" * 100_000)
"""
    for point, expected in ("fsync", "old"), ("rename", "old"), ("parent", "new" * 100_000):
        path = tmp_path / point
        folder.write_file(path, "old")
        killed = subprocess.run([sys.executable, "-c", script, point, str(path)], cwd=ROOT, timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert path.read_text() == expected


# --- verifying


def test_every_flipped_byte_of_a_file_is_seen(tmp_path):
    path = written(tmp_path / "x", {"a": bytes(range(64))})
    whole = (path / "a").read_bytes()
    for place in range(64):
        (path / "a").write_bytes(flipped(whole, place))
        (problem,) = folder.verify(path)
        assert str(path / "a") in problem and "changed" in problem
    (path / "a").write_bytes(whole)
    assert folder.verify(path) == []


def test_no_flipped_bit_of_a_manifest_crashes_or_hides_a_file(tmp_path):
    """Whatever became of the manifest, verify answers; and what it still calls good has all of its files intact."""
    path = written(tmp_path / "x", {"a": b"1234", "b": b"5678"})
    manifest = (path / folder.MANIFEST).read_bytes()
    unseen = 0
    for place in range(len(manifest)):
        (path / folder.MANIFEST).write_bytes(flipped(manifest, place))
        if not folder.verify(path):
            unseen += 1
            (path / "a").write_bytes(b"1235")
            assert folder.verify(path)
            (path / "a").write_bytes(b"1234")
    assert unseen < 0.01 * len(manifest)  # a blank that became another blank


def flipped(data: bytes, place: int) -> bytes:
    """`data` with one bit of byte `place` turned over, another one for each place."""
    changed = bytearray(data)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / "a.bin").write_bytes(b"\x00" * 99_999), "a.bin has 99999 bytes, not 100000"),
        (lambda path: (path / "a.bin").write_bytes(b""), "a.bin has 0 bytes"),
        (lambda path: (path / "a.bin").write_bytes(b"\x00" * 100_001), "a.bin has 100001 bytes"),
        (lambda path: (path / "deep/b.txt").write_bytes(b"same text"), "deep/b.txt has changed"),
        (lambda path: (path / "deep/er/c").unlink(), "deep/er/c is missing"),
        (lambda path: (path / "extra").write_bytes(b""), "extra is not in the manifest"),
        (lambda path: (path / "linked").symlink_to(path / "deep"), "linked is not in the manifest"),
        (lambda path: (path / "a.bin").rename(path / "b.bin"), "a.bin is missing"),
        (lambda path: link_to_copy(path / "a.bin"), "a.bin is not a file of its own"),
        (lambda path: replace_by_folder(path / "a.bin"), "a.bin is missing"),
        (lambda path: replace_by_fifo(path / "a.bin"), "a.bin is not a file of its own"),
        (lambda path: (path / folder.MANIFEST).unlink(), "manifest.json is missing"),
    ],
)
def test_damage_is_named(tmp_path, damage, complaint):
    path = written(tmp_path / "x")
    damage(path)
    assert any(problem.startswith(f"{path}/{complaint}") for problem in folder.verify(path)), folder.verify(path)


def link_to_copy(path: Path) -> None:
    copy = path.parent.parent / "copy"
    path.rename(copy)
    path.symlink_to(copy)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"[]", b"null", b'"files"', b"{}", b'{"files": null}', b'{"files": ["a.bin"]}', b"\xff\xfe",
     b'{"files": {"a.bin": 3}}', b'{"files": {"a.bin": {"size": 3}}}', b'{"files": {"a.bin": null}}', b"[" * 100_000,
     b'{"files": {"a.bin": {"size": "x", "sha256": 1}}}', b'{"files": {"../../etc": {"size": 1, "sha256": ""}}}'],
)  # fmt: skip
def test_a_bad_manifest_is_a_problem_and_no_crash(tmp_path, manifest):
    path = written(tmp_path / "x", {"a.bin": b"123"})
    (path / folder.MANIFEST).write_bytes(manifest)
    problems = folder.verify(path)
    assert problems and all(str(tmp_path) in problem for problem in problems)


def test_an_unreadable_file_is_a_problem_and_no_crash(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    path = written(tmp_path / "x", {"a": b"1"})
    monkeypatch.setattr(folder, "sha256", fail)
    assert folder.verify(path) == [f"{path / 'a'} cannot be read (Input/output error)"]


def test_every_problem_is_told_at_once(tmp_path):
    path = written(tmp_path / "x")
    (path / "a.bin").write_bytes(b"1")
    (path / "deep/b.txt").unlink()
    (path / "new").write_bytes(b"")
    assert len(folder.verify(path)) == 3


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in "file", "missing":
        assert folder.verify(tmp_path / name) == [f"{tmp_path / name} is not a folder"]


# --- choosing


def test_the_newest_that_verifies_is_found_and_the_others_reported(tmp_path):
    paths = [written(tmp_path / f"step-{n:08d}") for n in (9, 10, 100, 101)]
    fill(tmp_path / ".tmp-step-00000200-0123abcd")  # of a killed write
    (tmp_path / "step-00000300").write_bytes(b"a file")
    assert folder.newest_verified(tmp_path) == (paths[3], {})
    (paths[3] / "a.bin").write_bytes(b"")
    (paths[2] / folder.MANIFEST).unlink()
    found, skipped = folder.newest_verified(tmp_path)
    assert found == paths[1]
    assert list(skipped) == [paths[3], paths[2]]
    assert skipped == {path: folder.verify(path) for path in paths[2:]}
    for path in paths[:2]:
        (path / "extra").write_bytes(b"")
    found, skipped = folder.newest_verified(tmp_path)
    assert found is None and set(skipped) == set(paths)


def test_newest_of_nothing(tmp_path):
    assert folder.newest_verified(tmp_path) == folder.newest_verified(tmp_path / "missing") == (None, {})


def test_a_broken_folder_is_set_aside_and_kept(tmp_path):
    path = tmp_path / "x"
    for number in (1, 2):
        written(path)
        (path / "a.bin").write_bytes(bytes(number))
        aside = folder.set_aside(path)
        assert not path.exists()
        assert (aside / "a.bin").read_bytes() == bytes(number)
    written(path)
    assert folder.newest_verified(tmp_path) == (path, {})
    assert len(list(tmp_path.iterdir())) == 3
