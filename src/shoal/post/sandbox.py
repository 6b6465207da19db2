"""Runs code that nobody has vouched for: in a process of its own, without network, children or files to write, within limits.

What is held on Linux (x86-64, AArch64): only the system calls that `confined.CALLS` lists are there, so that the code can neither change a
file nor another process, send signals, or leave anything behind; address space, processor and wall-clock time are limited; root has no more
rights than to read files. With Landlock (Linux 5.13), memory and environment of other processes cannot be read. Elsewhere only the limits
hold.

What is not: the code reads every file that the user may read, though it can send it nowhere; threads and pipes take kernel memory
that is not counted. And code that shares an interpreter with its tests can deceive them: with an object that equals everything,
or by doing what `confined.py` does when it reports an end that was not reached. What it is to report is in no variable and no
memory of that process until then, but waits in a pipe that can be read. Look at what a policy writes before its rewards are believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError

CHILD = Path(__file__).with_name("confined.py")
START_SECONDS = 60.0
"""For loading a user's reward function with all it imports."""
LONGEST_ANSWER = 4096


@dataclass(frozen=True)
class Limits:
    """What one call may take."""

    seconds: float = 5.0
    memory: int = 1 << 30
    """Bytes of address space."""


class _Child:
    """A process in the sandbox, and all that it may have started. On Linux it ends with the thread that makes it, however that ends."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # One thread: more would each take address space, of which there is little.
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._rest = b""
        self.tell(orders | {"parent": os.getpid()})

    def tell(self, value: Any) -> None:
        """Send a line; whether anyone reads it shows in the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> Any:
        """The next line; None where the process ends, says something else, or takes longer."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if len(self._rest) > LONGEST_ANSWER or not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(self._process.stdout.fileno(), LONGEST_ANSWER)
                if not piece:
                    return None
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._process.wait()


def runs_to_end(code: str, limits: Limits) -> bool:
    """Whether a Python program gets to its end without an error and within the limits."""
    secret = secrets.token_hex(16)
    child = _Child({"code": code, "seconds": limits.seconds, "memory": limits.memory})
    child.tell(secret)
    try:
        return child.answer(limits.seconds) == secret
    finally:
        child.kill()


class Function:
    """A user's function in the sandbox: `FILE.py:NAME` or `MODULE:NAME`. A call that fails costs its result and nothing else."""

    def __init__(self, where: str, limits: Limits) -> None:
        self._where, self._limits = where, limits
        self._child: _Child | None = None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def load(self) -> None:
        """Start the process that waits for calls. Raises `UserError` where it has no such function."""
        # Processor time is counted over all calls, so it is the time of each that is watched from outside.
        orders = {"function": self._where, "seconds": 10**6, "memory": self._limits.memory}
        child = _Child(orders)
        answer = child.answer(START_SECONDS)
        if answer != "ready":
            child.kill()
            reason = answer if isinstance(answer, str) else f"it ends, or takes more than {START_SECONDS:g} s"
            raise UserError(f"reward {self._where} cannot be loaded: {reason}; a function of (prompt, reply, answer) is expected")
        self._child = child

    def call(self, **arguments: str) -> float | str:
        """Its result; or, in words, why there is none."""
        if self._child is None:  # not yet, or no longer
            try:
                self.load()
            except UserError as error:
                return str(error)
        assert self._child is not None
        self._child.tell(arguments)
        answer = self._child.answer(self._limits.seconds)
        if isinstance(answer, float | str):
            return answer
        self.close()
        return f"no result within {self._limits.seconds:g} s and {self._limits.memory >> 20} MiB"
