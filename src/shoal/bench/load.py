"""Clients that stream completions over HTTP, as light as can be: they share the machine with the server they measure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..runtime import give_way


@dataclass
class Load:
    """What clients do. `prompts` are token ids; an answer has `tokens`; a share `hang_up` of clients leaves before its end."""

    host: str
    port: int
    prompts: list[str]
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

    def work() -> Seen:
        give_way(19)
        return asyncio.run(_run(load))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


async def _run(load: Load) -> Seen:
    seen = Seen()
    began = time.perf_counter()
    await asyncio.gather(*(_client(load, seen, began + load.seconds, random.Random(load.seed * 10_007 + i)) for i in range(load.clients)))
    seen.seconds = time.perf_counter() - began
    return seen


async def _client(load: Load, seen: Seen, until: float, draw: random.Random) -> None:
    while time.perf_counter() < until:
        patience = draw.random() if draw.random() < load.hang_up else None
        try:
            await _request(load, seen, draw.choice(load.prompts), patience)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)


async def _request(load: Load, seen: Seen, prompt: str, patience: float | None) -> None:
    """One streamed completion; with `patience`, only that share of the time which answers take. Raises `ValueError` on errors."""
    body = {"prompt": prompt, "max_tokens": load.tokens, "temperature": 1.0, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {load.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(load.host, load.port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(status.decode(errors="replace").strip())
        first, last = 0.0, 0.0
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                seen.finished += 1
                seen.answers.append(time.perf_counter() - first)
                return
            if b'"error"' in line[:20]:
                raise ValueError(line.decode(errors="replace").strip())
            now = time.perf_counter()
            if first:
                seen.between.append(now - last)
            else:
                first = now
                seen.first.append(now - began)
            last = now
            seen.pieces += 1
            usual = seen.answers[-1] if seen.answers else 1.0
            if patience is not None and now - first >= patience * usual:
                seen.hung_up += 1
                return
        raise ValueError("the answer broke off")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
