"""Write a folder all at once or not at all, and tell later whether it is still what was written.

A folder is built under a temporary name beside its final place; every file is fsynced; `manifest.json`, with the size
and sha256 of each file, is written last; then the folder is renamed. A reader therefore sees no folder, or a whole
one, and `verify` notices anything that changed since. A crash leaves at most a `.tmp-*` sibling, which the next write
of the same folder clears away.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


@contextlib.contextmanager
def write(path: str | Path, tidy: bool = True) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends without an exception it becomes `path`.

    Args:
        tidy: clear away first what interrupted writes of it have left, for which all its siblings are looked at; who
            writes thousands of siblings does that once for all of them (`clear_all_leftovers`).

    Raises:
        FileExistsError: `path` exists already; it is never overwritten.
        ValueError: the block left something that cannot be vouched for: a symbolic link, or a manifest of its own.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; a written folder is never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    if tidy:
        clear_leftovers(path)
    temporary = path.parent / f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        files = {name: _describe(temporary / name) for name in _files(temporary)}
        if MANIFEST in files:
            raise ValueError(f"{path / MANIFEST} is written by storage.folder: give the file another name")
        write_file(temporary / MANIFEST, json.dumps({"files": files}, indent=1))
        for directory in [temporary, *(entry for entry in temporary.rglob("*") if entry.is_dir())]:
            _fsync(directory)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(path: str | Path) -> None:
    """Remove what interrupted writes of the folder or file `path` left behind."""
    path = Path(path)
    leftover = re.compile(re.escape(f"{_TEMPORARY}{path.name}-") + "[0-9a-f]{8}")  # no other's: a-b is not a
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if leftover.fullmatch(entry.name):
            _remove(entry)


def clear_all_leftovers(root: str | Path) -> None:
    """Remove what interrupted writes and removals of any folder under `root` left behind. Nobody else may be writing
    there."""
    root = Path(root)
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.name.startswith(_TEMPORARY):
            _remove(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def remove(path: str | Path) -> None:
    """Remove a folder; whoever looks meanwhile sees it whole or not at all."""
    path = Path(path)
    temporary = path.parent / f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: str | Path, data: str | bytes) -> None:
    """Write one file atomically: temporary sibling, fsync, rename."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """The name of a file to write; when the block ends without an exception it becomes `path`."""
    path = Path(path)
    clear_leftovers(path)
    temporary = path.parent / f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def verify(path: str | Path) -> list[str]:
    """What is wrong with the folder at `path`, one sentence a file; an empty list when it is whole."""
    path = Path(path)
    if not path.is_dir():
        return [f"{path} is not a folder"]
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (about["size"], about["sha256"]) for name, about in files.items()}
    except FileNotFoundError:
        return [f"{path / MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{path / MANIFEST} is not a manifest ({type(error).__name__}: {error})"]
    present = set(_files(path)) - {MANIFEST}
    problems = [f"{path / name} is missing" for name in sorted(set(expected) - present)]
    problems += [f"{path / name} is not in the manifest" for name in sorted(present - set(expected))]
    problems += [fault for name in sorted(present & set(expected)) if (fault := _fault(path / name, *expected[name]))]
    return problems


def sums(path: str | Path) -> dict[str, str]:
    """By file, the sha256 that the manifest of a folder states; it is not verified here."""
    return {name: about["sha256"] for name, about in json.loads((Path(path) / MANIFEST).read_text())["files"].items()}


def newest_verified(root: str | Path, name: str = r"[^.].*") -> tuple[Path | None, dict[Path, list[str]]]:
    """The last folder of `root` by name that verifies, and the later ones that do not, with their problems.

    Only folders whose names match the regular expression `name` are looked at.
    """
    skipped: dict[Path, list[str]] = {}
    root = Path(root)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    for path in reversed([entry for entry in folders if re.fullmatch(name, entry.name)]):
        problems = verify(path)
        if not problems:
            return path, skipped
        skipped[path] = problems
    return None, skipped


def set_aside(path: str | Path) -> Path:
    """Rename a broken folder to `<name>.broken-N`, so that a good one can be written and the bad one looked at."""
    path = Path(path)
    number = next(n for n in range(1, 10_000) if not path.with_name(f".{path.name}.broken-{n}").exists())
    return path.rename(path.with_name(f".{path.name}.broken-{number}"))


def sha256(path: str | Path) -> str:
    """The sha256 of a file's content, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(root: Path) -> list[str]:
    """Everything below `root` that is not a folder, links to folders included."""
    entries = (entry for entry in root.rglob("*") if entry.is_symlink() or not entry.is_dir())
    return sorted(str(entry.relative_to(root)) for entry in entries)


def _fault(path: Path, size: int, digest: str) -> str | None:
    """What is wrong with one file of a folder, if anything is."""
    if not _is_plain(path):
        return f"{path} is not a file of its own, but a link or a device"
    try:
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, not {size}"
        return None if sha256(path) == digest else f"{path} has changed since it was written (sha256 differs)"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _describe(path: Path) -> dict[str, object]:
    if not _is_plain(path):
        raise ValueError(f"{path} is a link or a device: only files can be kept in a written folder")
    _fsync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
