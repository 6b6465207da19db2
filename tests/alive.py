"""Whether processes that nobody can wait for have ended, as Linux's /proc tells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path


def wait_for_end(processes: Sequence[int], seconds: float) -> None:
    """Returns when all have ended; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    """Whether a process is there, and does not only wait to be buried."""
    return state(process) not in ("Z", "")


def wait_for_state(process: int, letter: str, seconds: float = 30) -> None:
    """Returns when a process is in that state of Linux's, such as T for a halted one; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while state(process) != letter:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(process: int) -> str:
    """Linux's letter for the state of a process; empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
