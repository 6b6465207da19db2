"""Folders and files that are either there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".shoal-tmp"
"""Suffix that nobody else uses, of a folder or file that is being written or deleted: never read, free to remove when nobody writes."""


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder, and orders these writes itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final`; when the block ends well it is on disk and bears that name.

    Whatever was at `final` is replaced. When the block fails, the temporary folder goes and `final` stays as it was.
    """
    temporary = final.with_name(final.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        old = _set_aside(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(final.parent)
    if old is not None:
        shutil.rmtree(old)


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `final`; when the block ends well the file is on disk and bears that name.

    Whatever was at `final` is replaced. When the block fails, the temporary file goes and `final` stays as it was.
    """
    temporary = final.with_name(final.name + TEMPORARY)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder; it loses its name first, so that an interrupted deletion leaves nothing that looks whole."""
    old = _set_aside(folder)
    if old is not None:
        shutil.rmtree(old)


def _set_aside(folder: Path) -> Path | None:
    """Give a folder a temporary name; None where there is no such folder."""
    if not folder.exists():
        return None
    old = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    return old
