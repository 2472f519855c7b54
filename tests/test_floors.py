"""Holds the layout: imports go one way down the floors, and every file follows the few rules a machine can check.

`problems` reads the files with `ast`, so an import inside a function, or for a type alone, counts like one at the top.
Rooms on one floor may import each other as long as no circle comes of it, and neither may modules make one. The tests
below the checker plant faults to see that it finds them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Highest first. A script at the root is a room of its own on the top floor, beside these.
FLOORS = (
    ("benchmarks", "deploy"),
    ("training", "distill"),
    ("evaluation", "export", "serve"),
    ("checkpoints",),
    ("data",),
    ("observe", "tokenizer"),
    ("models",),
    ("machine", "settings", "storage"),
)
FLOOR = {room: len(FLOORS) - index for index, rooms in enumerate(FLOORS) for room in rooms}
ENTRIES = len(FLOORS)
# Within models/, from the top: its two folders, and between them what lies in models/ itself.
MODELS_FLOOR = {"models/inference": 3, "models": 2, "models/kernels": 1}
MODELS_MAY_IMPORT = {"models", "machine", "torch", "snntorch", "triton", "numpy", *sys.stdlib_module_names}
WITHOUT_TORCH = ("settings", "storage", "machine/process.py", "models/kernels/limits.py", "models/kernels/ignored.py")
STDLIB_ONLY = ("deploy",)  # runs before anything is installed
PERSONAL_PATH = re.compile(r"(?<![\w.~$}/*-])/(?:home|Users|root|workspace)/\w")


def project_files(root: Path) -> list[Path]:
    """Every file of the project, relative to `root`: what git tracks or would track; without git, what is there."""
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [Path(name) for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = {line.strip("/\n") for line in (root / ".gitignore").open(encoding="utf-8")} | {".git"}
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in ignored]
            found += [Path(folder, name).relative_to(root) for name in names]
    return sorted(path for path in found if (root / path).is_file())


def imported(tree: ast.Module, path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(line, module, names taken from it) of every import in a file, relative ones resolved; "" for a module that
    leaves the root."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level == 0:
                yield node.lineno, node.module, names
            else:
                package = path.parts[:-1]
                base = package[: len(package) - (node.level - 1)] if node.level <= len(package) else ()
                yield node.lineno, ".".join([*base, node.module or ""]).strip(".") if base else "", names


def top(module: str) -> str:
    return module.split(".")[0]


def file_of(module: str, files: set[Path]) -> Path | None:
    """The project's file that `module` is, if it is one."""
    path = module.replace(".", "/")
    return next((file for file in (Path(f"{path}.py"), Path(path, "__init__.py")) if file in files), None)


def needed_files(tree: ast.Module, path: Path, files: set[Path]) -> dict[Path, int]:
    """The project's files that `path` imports, and the line of each: of `from a import b` that is a/b.py where there
    is one, else a."""
    needed = {}
    for line, module, names in imported(tree, path):
        for found in [file_of(f"{module}.{name}", files) for name in names] or [None]:
            file = found or file_of(module, files)
            if file not in (None, path):
                needed.setdefault(file, line)
    return needed


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def import_problems(path: Path, tree: ast.Module, floor: dict[str, int]) -> Iterator[str]:
    """What one file of a room imports that it may not."""
    room = room_of(path)
    if room not in floor:
        yield f"{path}: no floor has a room named {room}: give it its place in FLOORS"
        return
    without_torch = room in WITHOUT_TORCH or path.as_posix() in WITHOUT_TORCH
    for line, whole, _ in imported(tree, path):
        where, module = f"{path}:{line}", top(whole)
        if module == "":
            yield f"{where}: a relative import leaves the project"
        elif module == "tests":
            yield f"{where}: {room} imports tests"
        elif floor.get(module, 0) > floor[room]:
            yield f"{where}: {room} imports {module}, which is on a higher floor"
        elif room == "models" and module not in MODELS_MAY_IMPORT:
            yield f"{where}: models imports {module}, but may import only torch, snntorch, triton, numpy, machine"
        elif without_torch and whole == "torch":
            yield f"{where}: {room} imports torch, which is not to be needed here"
        elif room in STDLIB_ONLY and module not in {room, *sys.stdlib_module_names}:
            yield f"{where}: {room} imports {module}, but runs before anything is installed"


def models_problems(path: Path, needed: dict[Path, int]) -> Iterator[str]:
    """What a file of models/ imports from a floor of that room above its own."""
    own = MODELS_FLOOR.get(path.parent.as_posix())
    if path.parts[0] != "models" or len(path.parts) < 2:
        return
    if own is None:
        yield f"{path}: models has no floor {path.parent}: give it its place in MODELS_FLOOR"
        return
    for file, line in needed.items():
        if file != Path("models/__init__.py") and MODELS_FLOOR.get(file.parent.as_posix(), 0) > own:
            yield f"{path}:{line}: {path.parent} imports {file}, which is on a higher floor"


def circles(kind: str, edges: dict[Any, set[Any]]) -> Iterator[str]:
    """The first circle, if there is one."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        yield f"{kind} import each other in a circle: " + " -> ".join(map(str, reversed(error.args[1])))


def problems(root: Path, files: Iterable[Path]) -> list[str]:
    """Everything wrong with the files (relative to `root`), one line each; empty when all is well."""
    files = list(files)
    scripts = {path.stem: ENTRIES for path in files if len(path.parts) == 1 and path.suffix == ".py"}
    floor = {**FLOOR, **scripts}
    rooms: dict[str, set[str]] = {}  # across floors, an import upwards tells of a circle already
    modules: dict[Path, set[Path]] = {}
    found = []
    for path in files:
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if PERSONAL_PATH.search(line):
                found.append(f"{path}:{number}: names an absolute path of a home or work folder")
        if path.suffix != ".py":
            continue
        try:
            tree = ast.parse(text, filename=str(path))
        except SyntaxError as error:
            found.append(f"{path}:{error.lineno}: does not parse: {error.msg}")
            continue
        if not (ast.get_docstring(tree) or "").strip():
            found.append(f"{path}: no docstring that says what the file is for")
        room = room_of(path)
        if room == "tests":
            continue
        found += import_problems(path, tree, floor)
        needed = needed_files(tree, path, set(files))
        found += models_problems(path, needed)
        beside = {top(module) for _, module, _ in imported(tree, path)} - {room}
        rooms.setdefault(room, set()).update(other for other in beside if floor.get(other) == floor.get(room))
        modules[path] = set(needed)
    round_trips = list(circles("rooms", rooms))
    return found + (round_trips or list(circles("modules", modules)))


def test_the_project_keeps_its_rules():
    files = project_files(ROOT)
    assert Path("tests/test_floors.py") in files
    assert problems(ROOT, files) == []


GOOD = {
    "train_it.py": '"""Entry."""\nfrom training import trainer\n',
    "training/trainer.py": '"""Loop."""\nimport torch\nimport data.loader\nfrom . import schedule\n',
    "data/loader.py": '"""Batches."""\nimport numpy\nfrom storage import folder\n',
    "tokenizer/bpe.py": '"""BPE."""\nfrom settings import Section\n',
    "tokenizer/train.py": '"""Training."""\nfrom tokenizer.bpe import Tokenizer\n',
    "observe/progress.py": '"""Progress."""\nimport tokenizer.bpe\n',
    "models/attention.py": '"""Attention."""\nfrom models.kernels import banded\nfrom machine import process\n',
    "models/kernels/banded.py": '"""Banded."""\nimport numpy\nimport torch\n',
    "models/inference/decoding.py": '"""Decoding."""\nfrom models.flow import Flow\n',
    "machine/process.py": '"""This process."""\nimport os\n',
    "models/flow.py": '"""Flow."""\nfrom __future__ import annotations\nimport math\nimport torch.nn as nn\n'
    "from .attention import attend\nfrom models.config import ModelConfig\n",
    "tests/data/test_loader.py": '"""Any room."""\nimport training.trainer\n',
    "docs/notes.md": "See https://example.org/workspace/x, ../workspace/y and runs/home/z.\n",
}


def plant(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return problems(root, [Path(name) for name in files])


def test_a_good_tree_passes(tmp_path):
    assert plant(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("data/x.py", "from training.trainer import fit", "data imports training, which is on a higher floor"),
        ("observe/x.py", "def f():\n    import data.loader", "observe imports data, which is on a higher floor"),
        ("training/x.py", "import train_it", "training imports train_it, which is on a higher floor"),
        ("export/x.py", "import benchmarks.speed", "export imports benchmarks, which is on a higher floor"),
        ("models/x.py", "import pandas", "models imports pandas"),
        ("models/kernels/x.py", "from models.flow import Flow", "models/kernels imports models/flow.py, which is on a"),
        ("models/x.py", "import models.inference.decoding", "models imports models/inference/decoding.py, which is on"),
        ("models/layers/x.py", "import torch", "models has no floor models/layers"),
        ("models/attention.py", "from models import flow", "modules import each other in a circle"),
        ("tokenizer/bpe.py", "if TYPE_CHECKING:\n    from tokenizer.train import T", "modules import each other"),
        ("machine/process.py", "def f():\n    import torch", "machine imports torch, which is not to"),
        ("models/x.py", "from settings import Section", "models imports settings"),
        ("storage/x.py", "import torch", "storage imports torch"),
        ("settings/x.py", "from torch import nn", "settings imports torch"),
        ("deploy/x.py", "import yaml", "deploy imports yaml"),
        ("serve/x.py", "from tests.conftest import ROOT", "serve imports tests"),
        ("settings/x.py", "import tokenizer.bpe", "settings imports tokenizer, which is on a higher floor"),
        ("tokenizer/bpe.py", "import observe.progress", "rooms import each other in a circle"),
        ("data/x.py", "from ... import y", "a relative import leaves the project"),
        ("misc/x.py", "import os", "no floor has a room named misc"),
        ("data/x.py", "def f(:", "does not parse"),
        ("serve/x.py", 'PLACE = "/' + 'home/someone/x"', "names an absolute path"),
        ("docs/x.md", "cd /" + "workspace/main", "names an absolute path"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, name, text, complaint):
    text = f'"""Planted."""\n{text}\n' if name.endswith(".py") else text
    found = plant(tmp_path, {**GOOD, name: text})
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize("text", ["", "x = 1\n", '""" """\n', "# a comment\n"])
def test_a_file_without_a_docstring_is_found(tmp_path, text):
    found = plant(tmp_path, {"tests/test_x.py": text})
    assert found == ["tests/test_x.py: no docstring that says what the file is for"]


def test_files_are_found_with_git_and_without(tmp_path):
    plant(tmp_path, {**GOOD, ".gitignore": ".venv/\nruns/\n", ".venv/x.py": "import y\n", "runs/a/b.py": "import y\n"})
    expected = sorted(Path(name) for name in [*GOOD, ".gitignore"])
    assert project_files(tmp_path) == expected
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "data"], check=True)
    assert project_files(tmp_path) == expected


def drawing(files: list[Path]) -> str:
    """A mermaid drawing of which room imports which, without the arrows that follow from others."""
    needs: dict[str, set[str]] = {}
    for path in files:
        if path.suffix == ".py" and room_of(path) in FLOOR and len(path.parts) > 1:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            found = {top(module) for _, module, _ in imported(tree, path)} & FLOOR.keys()
            needs.setdefault(room_of(path), set()).update(found - {room_of(path)})
    order = list(TopologicalSorter(needs).static_order())
    reached: dict[str, set[str]] = {}
    for room in order:
        reached[room] = needs.get(room, set()).union(*(reached[other] for other in needs.get(room, ())))
    lines = ["graph TD"]
    for room in sorted(needs, key=lambda name: (-FLOOR[name], name)):
        others = needs[room]
        direct = sorted(other for other in others if not any(other in reached[third] for third in others))
        lines += [f"    {room} --> {other}" for other in direct]
    return "\n".join(lines)


def test_the_drawing_of_the_house_is_that_of_its_imports():
    drawn = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```mermaid\n")[1].split("\n```")[0]
    assert drawn == drawing(project_files(ROOT))
