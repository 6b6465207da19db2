"""A module of Shoal that runs in a process of its own: what it takes and leaves behind is then its own too."""

from __future__ import annotations

import os
import subprocess
import sys

from .config import UserError

MEMBERSHIP = ("WORLD_SIZE", "RANK", "TORCHELASTIC_USE_AGENT_STORE")
"""Variables that make a process one of a launch, which what runs apart is not."""


def run_apart(module: str, *args: str, failed: str) -> str:
    """`python -m MODULE ARGS` to its end; the last line of its stdout.

    Raises `UserError`, `failed` and the last line of its stderr, where it ends with an error.
    """
    environment = {name: value for name, value in os.environ.items() if name not in MEMBERSHIP}
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{failed}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}")
    return (done.stdout.splitlines() or [""])[-1]
