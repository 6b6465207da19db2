"""The engine in a process of its own: the same answers, and every way in which one of the two processes can end."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fake_runner import FakeRunner, continuation
from tests.alive import wait_for_end

from shoal.config import EngineOptions, SamplingOptions, UserError
from shoal.engine import AsyncEngine, Batch, Engine, EngineClosed, EngineFailed, EngineProcess, Forward, Request


class Slow(FakeRunner):
    """Takes some milliseconds a step, and breaks down at many tokens 96 at once."""

    def forward(self, batch: Batch) -> Forward:
        time.sleep(0.003)
        if int((batch.ids == 96).sum()) > 20:
            raise MemoryError("the runner broke")
        return super().forward(batch)


def make() -> Engine:
    return Engine(Slow(), None, EngineOptions(max_running=8))  # type: ignore[arg-type]


def refuse() -> Engine:
    raise UserError("there is no such model")


def break_down() -> Engine:
    raise ZeroDivisionError("by zero")


def die() -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)
    return make()


def take_long() -> Engine:
    time.sleep(60)
    return make()


def greedy(count: int) -> SamplingOptions:
    return SamplingOptions(max_tokens=count, temperature=0, ignore_eos=True)


def run(test: Callable[[AsyncEngine], Awaitable[None]]) -> EngineProcess:
    """The test, with an engine that is closed at its end; where it worked."""
    place = EngineProcess(make)

    async def limited() -> None:
        async with AsyncEngine(place) as server:
            await asyncio.wait_for(test(server), 60)

    asyncio.run(limited())
    return place


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def test_answers_refusals_and_hanging_up() -> None:
    async def test(server: AsyncEngine) -> None:
        assert server.context == FakeRunner().config.max_position_embeddings

        async def ask(i: int) -> None:
            pieces = [increment async for increment in server.stream(Request([i, 5], greedy(20 + i)))]
            assert [token.id for piece in pieces for token in piece.tokens] == continuation([i, 5], 20 + i, 97)
            assert len(pieces) > 1

        with pytest.raises(UserError, match="shorten it"):
            await server.submit(Request([5] * 400))
        await asyncio.gather(*(ask(i) for i in range(20)))
        assert server.stats().finished == {"length": 20}
        ticket = await server.submit(Request([5], greedy(390)))
        await ticket.take()
        assert server.stats().pages_in_use > 0
        server.cancel(ticket)
        await until(lambda: not server.stats().pages_in_use)
        assert server.stats().finished == {"length": 20, "abort": 1}

    place = run(test)
    assert place._process.exitcode == 0


def test_a_request_larger_than_a_pipe_holds_up_nobody() -> None:
    async def test(server: AsyncEngine) -> None:
        running = asyncio.create_task(server.generate(Request([5], greedy(60))))
        with pytest.raises(UserError, match="the model sees"):
            await server.submit(Request([5] * 1_000_000))
        assert (await running).ids == continuation([5], 60, 97)

    run(test)


def test_a_request_that_cannot_be_sent_is_refused_and_holds_up_nobody() -> None:
    async def test(server: AsyncEngine) -> None:
        running = asyncio.create_task(server.generate(Request([5], greedy(60))))
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            await server.submit(Request([5], mask=lambda: None))
        assert (await server.generate(Request([6], greedy(5)))).ids == continuation([6], 5, 97)
        assert (await running).ids == continuation([5], 60, 97)
        await server.drain()

    run(test)


def test_draining_finishes_what_runs() -> None:
    async def test(server: AsyncEngine) -> None:
        running = asyncio.create_task(server.generate(Request([5], greedy(50))))
        await asyncio.sleep(0.05)
        await server.drain()
        assert (await running).ids == continuation([5], 50, 97)
        with pytest.raises(EngineClosed):
            await server.submit(Request([5]))

    run(test)


def test_a_breakdown_reaches_everybody() -> None:
    async def test(server: AsyncEngine) -> None:
        running = asyncio.create_task(server.generate(Request([5], greedy(390))))
        await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(running, server.generate(Request([96] * 30, greedy(5))), return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, EngineFailed)
            assert "MemoryError: the runner broke" in str(outcome)
        assert not server.is_accepting

    run(test)


def test_a_process_that_is_killed_is_a_breakdown() -> None:
    async def test(server: AsyncEngine) -> None:
        running = asyncio.create_task(server.generate(Request([5], greedy(390))))
        await asyncio.sleep(0.05)
        place = server._place
        assert isinstance(place, EngineProcess)
        assert place._process.pid is not None
        os.kill(place._process.pid, signal.SIGKILL)
        with pytest.raises(EngineFailed, match="killed by SIGKILL: too little memory"):
            await running
        with pytest.raises(EngineFailed):
            await server.submit(Request([5]))

    run(test)


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (refuse, UserError, "there is no such model"),
        (break_down, RuntimeError, "ZeroDivisionError: by zero"),
        (die, RuntimeError, "killed by SIGKILL"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(make: Callable[[], Engine], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        EngineProcess(make)


def test_a_model_that_nobody_wants_any_more_is_not_loaded() -> None:
    unwanted = threading.Event()
    threading.Timer(0.2, unwanted.set).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="killed by SIGKILL"):
        EngineProcess(take_long, unwanted)
    assert time.monotonic() - began < 30


def test_it_ends_with_the_process_that_asks() -> None:
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_engine_process import make
from shoal.engine import EngineProcess
if __name__ == "__main__":
    print(EngineProcess(make)._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    asker = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    wait_for_end([int(asker.stdout)], 20)
