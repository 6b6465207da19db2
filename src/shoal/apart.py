"""A module of Shoal that runs in a process of its own: what it takes and leaves behind is then its own too."""

from __future__ import annotations

import subprocess
import sys

from .config import UserError


def run_apart(module: str, *args: str, failed: str) -> str:
    """`python -m MODULE ARGS` to its end; the last line of its stdout.

    Raises `UserError`, `failed` and the last line of its stderr, where it ends with an error.
    """
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{failed}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}")
    return (done.stdout.splitlines() or [""])[-1]
