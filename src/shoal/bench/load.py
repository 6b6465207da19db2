"""Clients that stream completions over HTTP, as light as can be: they share the machine with the server they measure."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..runtime import give_way


@dataclass
class Load:
    """What clients do. `prompt` makes the text of every request; an answer has `tokens`; a share `hang_up` leaves before its end."""

    host: str
    port: int
    prompt: Callable[[], str]
    tokens: int
    hang_up: float
    clients: int
    seconds: float
    seed: int


@dataclass
class Seen:
    """What clients saw; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    """Pieces of text of one answer; a piece may hold several tokens."""
    answers: list[float] = field(default_factory=list)
    """From the first piece to the end of answers that were listened to."""
    pieces: int = 0
    finished: int = 0
    hung_up: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Seen) -> None:
        """What was seen in another run."""
        self.first += other.first
        self.between += other.between
        self.answers += other.answers
        self.errors += other.errors
        self.pieces += other.pieces
        self.finished += other.finished
        self.hung_up += other.hung_up
        self.seconds += other.seconds


def run_load(load: Load) -> Seen:
    """Let all clients work until the time is over, then wait for the last answers (which still count).

    They work on a thread of low priority: from another machine they would take no time of the server's.
    """
    seen: Future[Seen] = Future()

    def work() -> None:
        give_way(19)
        try:
            seen.set_result(asyncio.run(_run(load)))
        except BaseException as error:
            seen.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # where a signal ends the wait, nothing else waits for the clients
    return seen.result()


async def _run(load: Load) -> Seen:
    seen = Seen()
    began = time.perf_counter()
    until = began + load.seconds
    draws = (random.Random(load.seed * 10_007 + i) for i in range(load.clients))
    await asyncio.gather(*(_client(load, seen, until, draw) for draw in draws))
    seen.seconds = time.perf_counter() - began
    return seen


def _request(load: Load) -> bytes:
    """One streamed completion, as it goes over the wire."""
    body = {"prompt": load.prompt(), "max_tokens": load.tokens, "temperature": 1.0, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {load.host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def _client(load: Load, seen: Seen, until: float, draw: random.Random) -> None:
    """One request after the other on one connection, which hanging up ends."""
    connection: _Connection | None = None
    while time.perf_counter() < until:
        patience = draw.random() if draw.random() < load.hang_up else None
        try:
            if connection is None or connection.is_closed:
                _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(seen), load.host, load.port)
            await connection.ask(_request(load), patience)
        except (OSError, ValueError) as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)
    if connection is not None:
        connection.close()


class _Connection(asyncio.Protocol):
    """Reads streams of events without taking them apart: it only looks for where events begin."""

    _EVENT, _FAILED, _DONE, _END = b"\ndata: {", b'\ndata: {"error"', b"\ndata: [DONE]", b"\r\n0\r\n\r\n"
    _KEPT = len(_FAILED) - 1
    """Bytes of what came before that are looked at again: a mark may arrive in two parts."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self.is_closed = False
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Of the present answer."""
        self._ended.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: bytes, patience: float | None) -> None:
        """Read the answer; with `patience`, only for that share of the time which answers take. Raises `ValueError` on errors."""
        self._patience, self._status, self._tail = patience, b"", b""
        self._began, self._first, self._last, self._finished = time.perf_counter(), 0.0, 0.0, False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended

    def close(self) -> None:
        self.is_closed = True
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._ended.done():
            return
        window = self._tail + data
        if not self._status:
            self._status, line, _ = window.partition(b"\r\n")
            if not line:
                self._status, self._tail = b"", window
                return
            if b" 200 " not in self._status:
                self._fail(self._status.decode(errors="replace"))
                return
        if self._FAILED in window:
            self._fail(window[window.index(self._FAILED) :].decode(errors="replace").strip())
            return
        pieces = window.count(self._EVENT) - self._tail.count(self._EVENT)
        if pieces:
            self._count(pieces)
        if not self._finished and self._DONE in window:
            self._finished = True
            self._seen.finished += 1
            self._seen.answers.append(time.perf_counter() - self._first)
        self._tail = window[-self._KEPT :]
        if self._finished and self._tail.endswith(self._END):
            self._ended.set_result(None)
        elif self._patience is not None and self._first and not self._finished:
            usual = self._seen.answers[-1] if self._seen.answers else 1.0
            if self._last - self._first >= self._patience * usual:
                self._seen.hung_up += 1
                self.close()
                self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if self._ended.done():
            return
        if self._finished:
            self._ended.set_result(None)  # a server that says the end by closing
        else:
            self._fail("the answer broke off" if error is None else str(error))

    def _fail(self, why: str) -> None:
        self.close()
        self._ended.set_exception(ValueError(why))

    def _count(self, pieces: int) -> None:
        now, seen = time.perf_counter(), self._seen
        for _ in range(pieces):
            if self._first:
                seen.between.append(now - self._last)
            else:
                self._first = now
                seen.first.append(now - self._began)
            self._last = now
        seen.pieces += pieces
