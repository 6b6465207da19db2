"""`--nproc N`: start N processes of the same command on this machine, and stop all as soon as one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from ..config import UserError
from ..runtime import available_cores

POLL_SECONDS = 0.05
BLAME_SECONDS = 0.5
"""How long to wait after the first death before naming its cause: the others fail too, because it is gone."""


LIFELINE = "SHOAL_LIFELINE"
"""Variable that tells a process which file descriptor ends when its parent does."""


@dataclass
class Member:
    """One of the processes."""

    rank: int
    process: subprocess.Popen
    complaints: IO[bytes] | None
    """What it wrote to stderr; the first one writes to ours."""

    def cause(self) -> str:
        code = self.process.returncode
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}" + (f": {last}" if (last := self._last_line()) else "")

    def _last_line(self) -> str:
        if self.complaints is None:
            return ""
        self.complaints.seek(0)
        lines = self.complaints.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""


def launch(args: list[str], count: int) -> None:
    """Run `shoal ARGS` in `count` processes that find each other; returns when all have finished.

    Raises `UserError` when one of them dies, naming it and the cause; bad input that all of them refuse is told once.
    """
    from torch.distributed import TCPStore

    # The store in which they find each other lives here, on a port that is free: no race for one.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // count))),
    }  # fmt: skip
    # Its other end is ours alone: whatever becomes of us, the others see it end (`follow_parent`).
    lifeline, ours = os.pipe()
    inherited = (lifeline,) if os.name == "posix" else ()  # Windows passes none on
    if inherited:
        shared[LIFELINE] = str(lifeline)
    members = []
    for rank in range(count):
        complaints = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as its process)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = None if rank == 0 else subprocess.DEVNULL
        command = [sys.executable, "-m", "shoal", *args]
        environment = os.environ | shared | place
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=complaints, pass_fds=inherited)
        members.append(Member(rank, process, complaints))

    def pass_on(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the whole group of processes by itself; whoever else asks us to stop means all of them.
        if number == signal.SIGTERM:
            for member in members:
                member.process.terminate()

    before: dict[int, Any] = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _wait(members)
    finally:
        for member in members:
            member.process.kill()
            member.process.wait()
        os.close(lifeline)
        os.close(ours)
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent() -> None:
    """In a process that `launch` started: end with whoever started it, be that killed. It would train on, beside the run that goes on."""
    if (lifeline := os.environ.pop(LIFELINE, None)) is None:
        return

    def wait() -> None:
        os.read(int(lifeline), 1)
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _wait(members: list[Member]) -> None:
    while any(member.process.poll() is None for member in members):
        if any(member.process.returncode for member in members):
            time.sleep(BLAME_SECONDS)
            break
        time.sleep(POLL_SECONDS)
    dead = [member for member in members if member.process.poll()]
    if not dead:
        return
    if members[0].process.returncode == 2:  # it has said why
        sys.exit(2)
    # Of several, one that was killed comes before those that only lost their connection to it.
    culprit = min(dead, key=lambda member: (member.process.returncode > 0, member.process.returncode == 1, member.rank))
    raise UserError(
        f"process {culprit.rank} of {len(members)} {culprit.cause()}; the others were stopped: go on from the last checkpoint with --resume"
    )
