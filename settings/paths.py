"""Folders that a config names and that are made when they are needed: what may stand in their way."""

import os
from pathlib import Path


def in_the_way(folder: Path) -> Path | None:
    """What keeps `folder` from being made: the nearest thing on the way to it that is there and is no folder."""
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
    return None if there is None or there.is_dir() else there


def kind_of(path: Path) -> str:
    """What is at `path`, for a message."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there"
    return "a folder" if path.is_dir() else "a file"
