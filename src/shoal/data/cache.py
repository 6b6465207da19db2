"""Folders that are built once and then only read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ..atomic import new_folder


def build_once(folder: Path, build: Callable[[Path], object]) -> None:
    """Unless `folder` exists, let `build` fill an empty folder beside it and give that its name when it is on disk.

    Several processes may call this at once: one builds, the others wait. What a killed process left behind is never taken for
    the result; the next call removes it.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        with new_folder(folder) as partial:
            build(partial)
