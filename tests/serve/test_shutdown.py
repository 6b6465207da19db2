"""SIGTERM, with a real process that is busy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import process
from tests.alive import wait_for_end

CLIENTS = 12


class Reader(threading.Thread):
    """Streams one completion; `events` are what came, `failure` why it broke off."""

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__()
        self.url, self.tokens = url, tokens
        self.events: list[str] = []
        self.failure: Exception | None = None
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with ask(self.url, {"prompt": "the red", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        self.events.append(line[6:].decode().strip())
                        self.begun.set()
        except Exception as error:
            self.failure = error
        finally:
            self.begun.set()


def ask(url: str, body: dict[str, Any]) -> Any:
    return urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=60
    )


def start(url: str, tokens: int) -> list[Reader]:
    readers = [Reader(url, tokens) for _ in range(CLIENTS)]
    for reader in readers:
        assert reader.begun.wait(60)
    return readers


def refusal(url: str) -> tuple[int, str]:
    """What a new request is told."""
    try:
        ask(url, {"prompt": "the"}).close()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["code"]
    return 200, ""


def test_what_runs_is_finished_and_nothing_new_begun(folder: Path) -> None:
    with process(folder) as (url, server):
        readers = start(url, 1200)
        server.send_signal(signal.SIGTERM)
        while (told := refusal(url))[0] == 200:
            pass
        assert told == (503, "shutting_down")
        for reader in readers:
            reader.join(60)
            assert reader.failure is None
            assert reader.events[-1] == "[DONE]"
            assert json.loads(reader.events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds the engine's process in /proc")
def test_a_server_that_is_loading_ends_at_once(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", "serve", str(folder), "--port", "0"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            while not (engines := list(engines_of(server.pid))):
                assert server.poll() is None
                time.sleep(0.005)
            os.kill(engines[0], signal.SIGSTOP)  # as a slow disk would have it
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
            wait_for_end(engines, 10)
            assert server.stderr is not None
            assert "cannot be loaded" not in server.stderr.read()
        finally:
            server.kill()


def engines_of(server: int) -> Iterator[int]:
    """The process that `server` has begun for its engine, if it is there."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == server and b"spawn_main" in (file.parent / "cmdline").read_bytes():
                yield int(file.parent.name)


def test_after_the_time_of_grace_the_rest_is_told_and_the_process_ends(folder: Path) -> None:
    with process(folder, "--grace", "0.3") as (url, server):
        readers = start(url, 8000)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        for reader in readers:
            reader.join(10)
            assert reader.failure is None
            assert reader.events[-1] == "[DONE]"
            assert json.loads(reader.events[-2])["error"]["code"] == "shutting_down"


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with process(folder) as (url, server):
        readers = start(url, 100_000)
        server.send_signal(signal.SIGINT)
        while refusal(url)[0] == 200:
            pass
        server.send_signal(signal.SIGINT)
        server.wait(20)
        for reader in readers:
            reader.join(10)
            assert reader.events[-1] != "[DONE]"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the engine's process in /proc")
def test_a_server_whose_engine_was_killed_ends_so_that_it_can_be_started_again(folder: Path) -> None:
    with process(folder) as (url, server):
        readers = start(url, 8000)
        os.kill(next(engines_of(server.pid)), signal.SIGKILL)
        assert server.wait(30) == 1
        for reader in readers:
            reader.join(10)
            assert reader.failure is not None or "engine_failed" in "".join(reader.events)
