"""Folders that are built once and then only read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


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
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build(partial)
            for file in partial.iterdir():
                _to_disk(file)
            _to_disk(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _to_disk(folder.parent)


def _to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, would survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder, and orders these writes itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
