"""Many coroutines, one engine: cancelling, draining, failing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FakeRunner, check_pages, continuation

from shoal.config import EngineOptions, SamplingOptions, UserError
from shoal.engine import AsyncEngine, Batch, Engine, EngineClosed, EngineFailed, EngineThread, Forward, Request


def greedy(count: int) -> SamplingOptions:
    return SamplingOptions(max_tokens=count, temperature=0, ignore_eos=True)


class Slow(FakeRunner):
    """Takes a millisecond a step, and fails when told to."""

    broken = False

    def forward(self, batch: Batch) -> Forward:
        time.sleep(0.001)
        if self.broken:
            raise MemoryError("the runner broke")
        return super().forward(batch)


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(Engine(Slow(), None, EngineOptions(**options))) as server:  # type: ignore[arg-type]
        yield server
    check_pages(engine_of(server))


def engine_of(server: AsyncEngine) -> Engine:
    assert isinstance(server._place, EngineThread)
    return server._place.engine


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(limited())


async def until_idle(server: AsyncEngine) -> None:
    while engine_of(server).has_work:
        await asyncio.sleep(0.001)


def test_many_at_once_get_their_own_answers_piece_by_piece() -> None:
    async def test() -> None:
        async with serving(max_running=8) as server:

            async def ask(i: int) -> None:
                pieces = [increment async for increment in server.stream(Request([i, 5], greedy(20 + i)))]
                assert len(pieces) > 1
                assert [token.id for piece in pieces for token in piece.tokens] == continuation([i, 5], 20 + i, 97)
                assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
                assert pieces[0].prompt is not None

            await asyncio.gather(*(ask(i) for i in range(30)))
            result = await server.generate(Request([1, 2, 3], greedy(4)))
            assert (result.ids, result.prompt_tokens) == (continuation([1, 2, 3], 4, 97), 3)
            assert server.stats().finished == {"length": 31}

    run(test)


def test_whoever_hangs_up_frees_pages_at_once_and_disturbs_nobody() -> None:
    async def test() -> None:
        async with serving(max_running=16) as server:
            draw = random.Random(0)

            async def ask(i: int) -> bool:
                patience, got = draw.choice([0, 1, 5, 1000]), []
                async with contextlib.aclosing(server.stream(Request([i, 5], greedy(40)))) as stream:
                    async for increment in stream:
                        got += [token.id for token in increment.tokens]
                        if len(got) >= patience:
                            return False
                assert got == continuation([i, 5], 40, 97)
                return True

            tasks = [asyncio.create_task(ask(i)) for i in range(60)]
            await asyncio.sleep(0.01)
            for task in tasks[::7]:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(outcome is True for outcome in outcomes) > 5
            assert all(isinstance(outcome, bool | asyncio.CancelledError) for outcome in outcomes)
            await until_idle(server)
            assert engine_of(server).pool.in_use == 0

    run(test)


def test_cancelling_takes_one_step() -> None:
    async def test() -> None:
        async with serving() as server:
            ticket = await server.submit(Request([5], greedy(390)))
            await ticket.take()
            server.cancel(ticket)
            before = engine_of(server).stats().steps
            await until_idle(server)
            assert engine_of(server).stats().steps - before <= 1
            assert engine_of(server).pool.in_use == 0
            server.cancel(ticket)

    run(test)


def test_a_request_that_cannot_be_served_is_refused_alone() -> None:
    async def test() -> None:
        async with serving() as server:
            other = asyncio.create_task(server.generate(Request([5], greedy(50))))
            with pytest.raises(UserError, match="shorten it"):
                await server.generate(Request([5] * 400))
            with pytest.raises(UserError, match="--top-p"):
                await server.submit(Request([5], SamplingOptions(top_p=7)))
            assert (await other).ids == continuation([5], 50, 97)

    run(test)


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    async def test() -> None:
        async with serving() as server:
            running = asyncio.create_task(server.generate(Request([5], greedy(100))))
            await asyncio.sleep(0.02)
            draining = asyncio.create_task(server.drain())
            await asyncio.sleep(0)
            assert not server.is_accepting
            with pytest.raises(EngineClosed):
                await server.submit(Request([5]))
            assert (await running).ids == continuation([5], 100, 97)
            await draining
            await server.drain()

    run(test)


def test_draining_ends_what_takes_longer_than_the_grace_time() -> None:
    async def test() -> None:
        async with serving() as server:
            running = [asyncio.create_task(server.generate(Request([i], greedy(390)))) for i in range(3)]
            await asyncio.sleep(0.02)
            await server.drain(grace=0.02)
            for i, result in enumerate(await asyncio.gather(*running)):
                assert result.finish_reason == "abort"
                assert result.ids == continuation([i], 390, 97)[: len(result.ids)]

    run(test)


def test_a_breakdown_reaches_everybody() -> None:
    async def test() -> None:
        async with serving() as server:
            running = [asyncio.create_task(server.generate(Request([i], greedy(390)))) for i in range(3)]
            await asyncio.sleep(0.02)
            engine_of(server).runner.broken = True  # type: ignore[attr-defined]
            for outcome in await asyncio.gather(*running, return_exceptions=True):
                assert isinstance(outcome, EngineFailed)
                assert isinstance(outcome.__cause__, MemoryError)
            assert not server.is_accepting
            with pytest.raises(EngineFailed, match="the runner broke"):
                await server.generate(Request([5]))
            engine_of(server).runner.broken = False  # type: ignore[attr-defined]
            for number in list(engine_of(server)._answers):
                engine_of(server).abort(number)

    run(test)


def test_who_reads_late_learns_of_a_breakdown_too() -> None:
    async def test() -> None:
        async with serving() as server:
            ticket = await server.submit(Request([1], greedy(390)))
            await asyncio.sleep(0.02)
            engine_of(server).runner.broken = True  # type: ignore[attr-defined]
            while server.is_accepting:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            assert (await ticket.take()).tokens
            with pytest.raises(EngineFailed):
                await ticket.take()
            engine_of(server).runner.broken = False  # type: ignore[attr-defined]
            for number in list(engine_of(server)._answers):
                engine_of(server).abort(number)

    run(test)


def test_an_event_loop_that_has_gone_leaves_nothing_behind() -> None:
    engine = AsyncEngine(Engine(Slow(), None, EngineOptions()))  # type: ignore[arg-type]

    def gone() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(engine.submit(Request([5], greedy(390))))
        loop.close()

    thread = threading.Thread(target=gone)
    thread.start()
    thread.join()

    async def test() -> None:
        assert (await engine.generate(Request([6], greedy(20)))).ids == continuation([6], 20, 97)
        await until_idle(engine)
        assert engine_of(engine).pool.in_use == 0
        assert engine.stats().finished["abort"] == 1
        await engine.close()

    run(test)


def test_a_program_that_ends_during_a_step_ends_after_it() -> None:
    """A step in C++ would come back to an interpreter that is gone, and abort."""
    code = f"""
import asyncio, sys, time
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_async_engine import Slow, greedy
from shoal.config import EngineOptions
from shoal.engine import AsyncEngine, Engine, Request

class Slower(Slow):
    def forward(self, batch):
        loop.call_soon_threadsafe(task.cancel)
        time.sleep(0.5)
        print("the step has ended", flush=True)
        return super().forward(batch)

async def main():
    global loop, task
    loop = asyncio.get_running_loop()
    server = AsyncEngine(Engine(Slower(), None, EngineOptions()))
    task = asyncio.ensure_future(server.generate(Request([1, 2, 3], greedy(90))))
    await asyncio.wait([task])

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the step has ended\n", "")


def test_a_mask_in_the_making_keeps_nobody_waiting() -> None:
    """Also where it is given up before it is there."""
    go = threading.Event()

    def make_mask(form: str) -> None:
        assert go.wait(10)
        if form == "broken":
            raise ValueError(form)

    async def test() -> None:
        engine = Engine(Slow(), None, EngineOptions(), make_mask)  # type: ignore[arg-type]
        async with AsyncEngine(engine) as server:
            waiting = [asyncio.ensure_future(server.generate(Request([5], greedy(3), mask=form))) for form in ("fine", "broken", "fine")]
            assert len((await server.generate(Request([6], greedy(3)))).ids) == 3
            assert not any(task.done() for task in waiting)
            waiting[2].cancel()
            go.set()
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[0].ids == continuation([5], 3, 97)  # type: ignore[union-attr]
        assert isinstance(results[1], RuntimeError)
        assert isinstance(results[2], asyncio.CancelledError)

    run(test)
