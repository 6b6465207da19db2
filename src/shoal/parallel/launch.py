"""`--nproc N`: start N processes of the same command on this machine, and stop all as soon as one of them dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from ..config import UserError
from ..runtime import available_cores

POSIX = os.name == "posix"
POLL_SECONDS = 0.05
BLAME_SECONDS = 0.5
"""How long to wait after the first death before naming its cause: the others fail too, because it is gone."""
LOST_OTHERS = 3
"""Exit code of a process that can only say that another one is gone."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended before there was anything to save."""
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
    inherited = (lifeline,) if POSIX else ()  # Windows passes none on
    if inherited:
        shared[LIFELINE] = str(lifeline)
    members = []
    for rank in range(count):
        complaints = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as its process)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = None if rank == 0 else subprocess.DEVNULL
        command = [sys.executable, "-m", "shoal", *args]
        environment = os.environ | shared | place
        # In a session of its own: what a terminal sends to all of its processes comes to us alone, and from us to each of them once.
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=complaints, pass_fds=inherited, start_new_session=True)
        members.append(Member(rank, process, complaints))
    try:
        with _signals_for(members):
            _wait(members)
    finally:
        for member in members:
            member.process.kill()
            member.process.wait()
        os.close(lifeline)
        os.close(ours)


@contextlib.contextmanager
def _signals_for(members: list[Member]) -> Iterator[None]:
    """The first request to stop is passed on to all; a second one ends us at once, and so them. Ctrl-Z halts all."""

    def stop(number: int, frame: FrameType | None) -> None:
        if POSIX or number == signal.SIGTERM:  # elsewhere Ctrl-C has reached all by itself
            _send(members, number)
        # Not as it was before: where a shell runs us in the background, that is to ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def halt(number: int, frame: FrameType | None) -> None:
        _send(members, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until we are told to go on
        _send(members, signal.SIGCONT)

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop} | ({signal.SIGTSTP: halt} if POSIX else {})
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(members: list[Member], number: int) -> None:
    for member in members:
        member.process.send_signal(number)


def follow_parent() -> None:
    """In a process that `launch` started: end with whoever started it, be that killed. It would train on, beside the run that goes on."""
    if (lifeline := os.environ.pop(LIFELINE, None)) is None:
        return

    def wait() -> None:
        os.read(int(lifeline), 1)
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


@contextlib.contextmanager
def ending_with_others() -> Iterator[None]:
    """Where another process of the run dies, this one ends with a line instead of the place where it was waiting for a message."""
    try:
        yield
    except RuntimeError as raised:
        from torch.distributed import DistNetworkError

        error: BaseException | None = raised
        while error is not None and not isinstance(error, DistNetworkError) and "gloo/transport" not in str(error):
            error = error.__cause__ or error.__context__  # a pipeline stage tells in its own words what went wrong in it
        if error is None:
            raise
        what = str(error).rpartition("] ")[2].partition(". ")[0]
        print(f"shoal: process {os.environ['RANK']} lost its connection to another one: {what}", file=sys.stderr)
        sys.exit(LOST_OTHERS)


def _wait(members: list[Member]) -> None:
    while None in (codes := [member.process.poll() for member in members]):
        if any(codes):
            time.sleep(BLAME_SECONDS)
            break
        time.sleep(POLL_SECONDS)
    dead = [member for member in members if member.process.poll()]
    if not dead:
        return
    if members[0].process.returncode == 2:  # it has said why
        sys.exit(2)
    if any(member.process.returncode == INTERRUPTED for member in dead):
        sys.exit(INTERRUPTED)
    # Of several, one that was killed comes before those that failed, and these before those that only lost their connection to it. Some
    # of the libraries below abort when that happens.
    consequences = (-signal.SIGABRT, LOST_OTHERS)
    culprit = min(dead, key=lambda member: (member.process.returncode in consequences, member.process.returncode > 0, member.rank))
    raise UserError(
        f"process {culprit.rank} of {len(members)} {culprit.cause()}; the others were stopped: go on from the last checkpoint with --resume"
    )
