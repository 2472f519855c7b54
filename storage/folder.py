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
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


@contextlib.contextmanager
def write(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends without an exception it becomes `path`.

    Raises:
        FileExistsError: `path` exists already; it is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; a written folder is never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    temporary = path.parent / f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        files = {name: _describe(temporary / name) for name in _files(temporary)}
        write_file(temporary / MANIFEST, json.dumps({"files": files}, indent=1))
        for directory in [temporary, *(entry for entry in temporary.rglob("*") if entry.is_dir())]:
            _fsync(directory)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(path: str | Path) -> None:
    """Remove what interrupted writes of the folder `path` left behind."""
    path = Path(path)
    for leftover in path.parent.glob(f"{_TEMPORARY}{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_file(path: str | Path, data: str | bytes) -> None:
    """Write one file atomically: temporary sibling, fsync, rename."""
    path = Path(path)
    temporary = path.parent / f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
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
        expected = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return [f"{path / MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path / MANIFEST} is not a manifest ({error})"]
    present = set(_files(path)) - {MANIFEST}
    problems = [f"{path / name} is missing" for name in sorted(set(expected) - present)]
    problems += [f"{path / name} is not in the manifest" for name in sorted(present - set(expected))]
    for name in sorted(present & set(expected)):
        size = (path / name).stat().st_size
        if size != expected[name]["size"]:
            problems.append(f"{path / name} has {size} bytes, not {expected[name]['size']}")
        elif sha256(path / name) != expected[name]["sha256"]:
            problems.append(f"{path / name} has changed since it was written (sha256 differs)")
    return problems


def newest_verified(root: str | Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The last folder of `root` by name that verifies, and the later ones that do not, with their problems."""
    skipped: dict[Path, list[str]] = {}
    root = Path(root)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    for path in reversed([entry for entry in folders if not entry.name.startswith(".")]):
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
    return sorted(str(entry.relative_to(root)) for entry in root.rglob("*") if entry.is_file())


def _describe(path: Path) -> dict[str, object]:
    _fsync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
