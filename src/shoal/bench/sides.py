"""The sides of a comparison, each in a process of its own: memory is then what the operating system counts, and threads do not meet."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..config import UserError
from .machine import Memory, memory_of

WORKERS = Path(__file__).parent / "peers"
OR_ELSEWHERE = ", or name another Python with --llama-python"


def require_peer(module: str, package: str, python: str | None = None) -> None:
    """Raises `UserError` where a Python (None: this one) cannot import a peer of `package`; to be asked before anything is measured."""
    try:
        done = subprocess.run([python or sys.executable, "-c", f"import {module}"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"{python} cannot be started ({error}): name a Python") from None
    if done.returncode:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{module} cannot be imported ({why}): pip install '{package}'{OR_ELSEWHERE if 'llama' in module else ''}")


class Side:
    """A worker of `bench.peers`, asked over pipes. Between requests it stands still (SIGSTOP), so that it cannot disturb the others."""

    def __init__(self, name: str, worker: str, python: str | None = None) -> None:
        self.name = name
        self.settings = ""
        self.loaded: dict[str, Any] = {}
        command = [python or sys.executable, str(WORKERS / f"{worker}.py")]
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started ({error}): name a Python") from None

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Raises `UserError` with what went wrong on the other side."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.send_signal(signal.SIGCONT)
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ProcessLookupError):
            line = ""
        if not line:
            raise UserError(f"{self.name} has ended: {self._last_words()}")
        self._process.send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(f"{self.name}: {reply['error']}")
        return reply

    def memory(self) -> Memory:
        return memory_of(self._process.pid)

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        if lines and "llama_cpp" in lines[-1]:
            return f"{lines[-1]}: pip install 'shoal[peers]'{OR_ELSEWHERE}"
        if self._process.returncode == -signal.SIGKILL:
            return "it was killed, probably for want of memory"
        return lines[-1] if lines else f"exit code {self._process.returncode}"
