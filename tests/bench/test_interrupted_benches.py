"""A benchmark that is asked to stop leaves no processes and no network namespaces behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest
from tests.alive import wait_for_end

from shoal.bench import network
from shoal.bench.network import Network
from shoal.bench.sides import Side
from shoal.cli import main


def test_sigterm_ends_the_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def run_bench(command: Any) -> None:
        side = Side("shoal", "loop")  # without requests it waits for some
        started.append(side._process.pid)
        side._process.send_signal(signal.SIGSTOP)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            side.close()

    monkeypatch.setattr("shoal.bench.train.run_bench", run_bench)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(["bench", "train"])
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    wait_for_end(started, 10)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [0, 4, 30])
def test_a_signal_while_namespaces_are_made_removes_them(stop: type[BaseException], call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    calls = 0

    def made(*command: str) -> None:
        nonlocal calls
        if command[:3] == ("ip", "netns", "add"):
            there.add(command[3])
        calls += 1
        if calls > call:
            raise stop

    def removed(command: list[str], **options: Any) -> None:
        there.discard(command[3])

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(network, "_run", made)
    monkeypatch.setattr(subprocess, "run", removed)
    with pytest.raises(stop), Network(8):
        pass
    assert calls == call + 1
    assert there == set()
