"""Folders that are built once and then only read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from ..atomic import new_folder


def build_once(folder: Path, build: Callable[[Path], object]) -> None:
    """Unless `folder` exists, let `build` fill an empty folder beside it and give that its name when it is on disk.

    Several processes may call this at once: one builds, the others wait. What a killed process left behind is never taken for
    the result; the next call removes it.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _held(FileLock(f"{folder}.lock"), folder.name):
        if folder.exists():
            return
        with new_folder(folder) as partial:
            build(partial)


def _held(lock: FileLock, name: str) -> AbstractContextManager[object]:
    """The lock, which may take another process's hours."""
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that prepares {name}", file=sys.stderr)
        return lock.acquire()
