"""The engine behind asyncio: it works elsewhere, and any number of coroutines wait for their answers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from ..config import ModelConfig
from .engine import Engine, EngineStats
from .places import EngineThread, Place
from .requests import Increment, Request, Result, join
from .worker import Add, Cancel, News, Stop

LOG = logging.getLogger("shoal.engine")
POLL_SECONDS = 0.01
"""How often draining looks whether the last request has ended."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it is draining or has stopped."""


class EngineFailed(RuntimeError):
    """The engine broke down and computes nothing any more. The cause is chained."""


class Ticket:
    """One submitted request: where its increments arrive. Made by `AsyncEngine.submit`."""

    def __init__(self, key: int, loop: asyncio.AbstractEventLoop) -> None:
        self.key, self.loop = key, loop
        self.decision: asyncio.Future[None] = loop.create_future()
        """Whether the engine takes it."""
        self._arrived = asyncio.Event()
        self._increments: list[Increment] = []
        self._failure: Exception | None = None

    def decide(self, refusal: Exception | None) -> None:
        """Called in the event loop."""
        if self.decision.done():
            return
        if refusal is None:
            self.decision.set_result(None)
        else:
            self.decision.set_exception(refusal)

    def put(self, increment: Increment) -> None:
        """Called in the event loop."""
        self._increments.append(increment)
        self._arrived.set()

    def fail(self, failure: Exception) -> None:
        """Called in the event loop: nothing more will come."""
        self.decide(failure)
        self._failure = failure
        self._arrived.set()

    async def take(self) -> Increment:
        """All that has arrived. Raises `EngineFailed` or `EngineClosed` where nothing more will come."""
        await self._arrived.wait()
        if self._failure is None:  # else the next call is to find it
            self._arrived.clear()
        increments, self._increments = self._increments, []
        if not increments:
            assert self._failure is not None
            raise self._failure
        return join(increments)


class AsyncEngine:
    """Sets an engine to work in its place (by default a thread of this process) and owns it. Methods may be called from any event loop.

    ```python
    async with AsyncEngine(engine) as server:
        async for increment in server.stream(Request(prompt)):
            print(increment.text)
    ```
    """

    def __init__(self, engine: Engine | Place) -> None:
        self._place: Place = EngineThread(engine) if isinstance(engine, Engine) else engine
        self._stats = self._place.stats
        self._tickets: dict[int, Ticket] = {}
        """Of requests that have not ended, by key."""
        self._keys = 0
        self._gate = threading.Lock()
        """Held to change the two above, or to declare that no more will be changed."""
        self._accepts = True
        self._ended = False
        self._failure: BaseException | None = None
        """What ended it, if it did not stop by itself."""
        self._place.start(self._hear, self._end)

    @property
    def config(self) -> ModelConfig:
        return self._place.config

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self._place.context

    @property
    def is_accepting(self) -> bool:
        """False while draining, after stopping and after a failure."""
        return self._accepts and not self._ended

    @property
    def unfinished(self) -> int:
        """Requests whose end has not been told, nor asked for."""
        return len(self._tickets)

    async def submit(self, request: Request) -> Ticket:
        """Queue a request; returns once it is accepted.

        Raises what `Place.send` does, and:
            UserError: it can never be served.
            EngineClosed: the engine is draining or has stopped.
            EngineFailed: the engine broke down.
        """
        return (await self.submit_all([request]))[0]

    async def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """Queue requests that the same steps may compute; returns once all are accepted. Where one is not, as `submit` has it, none is."""
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._send(request))
            await asyncio.gather(*(ticket.decision for ticket in tickets))
        except BaseException:
            for ticket in tickets:
                self.cancel(ticket)
            raise
        return tickets

    def _send(self, request: Request) -> Ticket:
        with self._gate:
            if self._ended or not self._accepts:
                raise self._refusal()
            ticket = Ticket(self._keys, asyncio.get_running_loop())
            self._keys += 1
            self._place.send(Add(ticket.key, request))
            self._tickets[ticket.key] = ticket
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request and free its pages before the next step; nothing happens if it has ended."""
        with self._gate:
            if self._tickets.pop(ticket.key, None) is not None:
                self._place.send(Cancel(ticket.key))

    async def stream(self, request: Request) -> AsyncIterator[Increment]:
        """Increments of the answer as they come, the last with its `finish_reason`; raises what `submit` raises.

        Closing the iterator early, or cancelling the task that reads it, cancels the request.
        """
        ticket = await self.submit(request)
        try:
            while True:
                increment = await ticket.take()
                yield increment
                if increment.finish_reason is not None:
                    return
        finally:
            self.cancel(ticket)

    async def generate(self, request: Request) -> Result:
        """The whole answer; see `stream`. Also for prompts only read (`max_tokens` 0): scores and embeddings are in `Result.prompt`."""
        result = Result(len(request.prompt))
        async for increment in self.stream(request):
            result.add(increment)
        return result

    def stats(self) -> EngineStats:
        """The figures that were told last: at most a step and some milliseconds old."""
        return self._stats

    async def drain(self, grace: float | None = None) -> None:
        """Take no more requests, wait for those there are (at most `grace` seconds), then `close`."""
        self._accepts = False
        loop = asyncio.get_running_loop()
        deadline = None if grace is None else loop.time() + grace
        while self._tickets and (deadline is None or loop.time() < deadline):
            await asyncio.sleep(POLL_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Stop after the present step. Answers that are not finished end with reason `abort`."""
        self._accepts = False
        self._place.send(Stop())
        await asyncio.to_thread(self._place.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _hear(self, news: News) -> None:
        """On a thread of the engine's place: pass on what it tells."""
        self._stats = news.stats
        post: defaultdict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        with self._gate:
            decided = [(self._tickets.get(key), refusal) for key, refusal in news.decided]
            arrived = [(self._tickets.get(key), increment) for key, increment in news.increments]
            for key, refusal in news.decided:
                if refusal is not None:
                    self._tickets.pop(key, None)
            for key, increment in news.increments:
                if increment.finish_reason is not None:
                    self._tickets.pop(key, None)
        for ticket, refusal in decided:
            if ticket is not None:
                post[ticket.loop].append(partial(ticket.decide, refusal))
        for ticket, increment in arrived:
            if ticket is not None:
                post[ticket.loop].append(partial(ticket.put, increment))
        for loop, calls in post.items():
            if not _call(loop, calls):
                self._leave(loop)

    def _end(self, failure: BaseException | None) -> None:
        """On a thread of the engine's place: nothing more will come."""
        with self._gate:
            self._ended, self._failure = True, failure
            tickets = list(self._tickets.values())
            self._tickets.clear()
        if failure is not None and self._accepts:
            LOG.error("the engine broke down", exc_info=failure)
        for ticket in tickets:
            _call(ticket.loop, [partial(ticket.fail, self._refusal())])

    def _refusal(self) -> EngineClosed | EngineFailed:
        """What a request is told that comes too late."""
        if self._failure is None:
            return EngineClosed("the engine is shutting down and takes no more requests")
        error = EngineFailed(f"the engine broke down: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel all requests of an event loop that is closed: nobody is left to read the answers."""
        for ticket in [ticket for ticket in self._tickets.values() if ticket.loop is loop]:
            self.cancel(ticket)


def _call(loop: asyncio.AbstractEventLoop, functions: list[Callable[[], None]]) -> bool:
    """Have `loop` call functions soon; False if it is closed."""
    try:
        loop.call_soon_threadsafe(_call_all, functions)
    except RuntimeError:
        return False
    return True


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
