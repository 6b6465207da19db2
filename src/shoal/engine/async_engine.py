"""The engine behind asyncio: one thread computes, any number of coroutines wait for their answers."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import NamedTuple

from .engine import Engine, EngineStats
from .requests import Increment, Request, Result

POLL_SECONDS = 0.01
"""How often draining looks whether the last request has ended."""
DELIVERY_SECONDS = 0.01
"""Steps faster than this are delivered together: waking every reader for every token would cost a small model half its speed."""
PROMPT_READERS = 8
"""So many answers are delivered as fast as that."""
GATHER_SECONDS, MOST_GATHER_SECONDS = 0.002, 0.15
"""For every answer beyond those, tokens wait longer for each other: passing on a piece of text costs a server about as much as computing
one token of a small model."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it is draining or has stopped."""


class EngineFailed(RuntimeError):
    """The engine broke down and computes nothing any more. The cause is chained."""


class Ticket:
    """One submitted request: where its increments arrive. Made by `AsyncEngine.submit`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.number: int | None = None
        """Of the request in the engine."""
        self.cancelled = False
        self.ended = False
        self.due = 0.0
        """When its next increments are delivered (by the monotonic clock); the first and the last are at once."""
        self._arrived = asyncio.Event()
        self._increments: list[Increment] = []
        self._failure: BaseException | None = None

    def put(self, increments: list[Increment]) -> None:
        """Called in the event loop."""
        self._increments += increments
        self.ended = increments[-1].finish_reason is not None
        self._arrived.set()

    def fail(self, error: BaseException) -> None:
        """Called in the event loop: nothing more will come."""
        self._failure, self.ended = error, True
        self._arrived.set()

    async def take(self) -> list[Increment]:
        """All that has arrived, at least one. Raises `EngineFailed` where nothing more will come."""
        await self._arrived.wait()
        self._arrived.clear()
        increments, self._increments = self._increments, []
        if not increments:
            raise EngineFailed(f"the engine broke down: {self._failure}") from self._failure
        return increments


class _Command(NamedTuple):
    """Something to do on the engine's thread between two steps."""

    function: Callable[[], None]
    done: Future[None]


class AsyncEngine:
    """Owns `engine` and the thread it runs on. Methods may be called from any event loop.

    ```python
    async with AsyncEngine(engine) as server:
        async for increment in server.stream(Request(prompt)):
            print(increment.text)
    ```
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._mail: defaultdict[int, list[Increment]] = defaultdict(list)
        """What has to be delivered, by request."""
        self._delivered = 0.0
        """When that was done last."""
        self._gate = threading.Lock()
        """Held to put a command or to declare that no more will be obeyed."""
        self._accepts = True
        """New requests."""
        self._obeys = True
        """Commands; False once the thread is about to end."""
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="shoal-engine", daemon=True)
        self._thread.start()

    @property
    def is_accepting(self) -> bool:
        """False while draining, after stopping and after a failure."""
        return self._accepts and self._failure is None

    async def submit(self, request: Request) -> Ticket:
        """Queue a request; returns once it is accepted.

        Raises:
            UserError: it can never be served.
            EngineClosed: the engine is draining or has stopped.
            EngineFailed: the engine broke down.
        """
        if self._failure is None and not self._accepts:
            raise EngineClosed("the engine is shutting down and takes no more requests")
        ticket = Ticket(asyncio.get_running_loop())

        def add() -> None:
            if not ticket.cancelled:
                ticket.number = self.engine.add_request(request)
                self._tickets[ticket.number] = ticket

        try:
            await asyncio.wrap_future(self._command(add))
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request and free its pages before the next step; nothing happens if it has ended."""
        ticket.cancelled = True

        def abort() -> None:
            if ticket.number is not None:
                self._tickets.pop(ticket.number, None)
                self.engine.abort(ticket.number)

        if not ticket.ended:
            with contextlib.suppress(EngineClosed, EngineFailed):
                self._command(abort)

    async def stream(self, request: Request) -> AsyncIterator[Increment]:
        """Increments of the answer as they come, the last with its `finish_reason`; raises what `submit` raises.

        Closing the iterator early, or cancelling the task that reads it, cancels the request.
        """
        ticket = await self.submit(request)
        try:
            while True:
                for increment in await ticket.take():
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
        """Present figures."""
        return self.engine.stats()

    async def drain(self, grace: float | None = None) -> None:
        """Take no more requests, wait for those there are (at most `grace` seconds), then `close`."""
        self._accepts = False
        loop = asyncio.get_running_loop()
        deadline = None if grace is None else loop.time() + grace
        while self._tickets and self._thread.is_alive() and (deadline is None or loop.time() < deadline):
            await asyncio.sleep(POLL_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Stop after the present step. Answers that are not finished end with reason `abort`."""
        self._accepts = False

        def stop() -> None:
            self._stopping = True

        with contextlib.suppress(EngineClosed, EngineFailed):
            self._command(stop)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _command(self, function: Callable[[], None]) -> Future[None]:
        with self._gate:
            if not self._obeys:
                raise self._refusal()
            command = _Command(function, Future())
            self._commands.put(command)
        return command.done

    def _refusal(self) -> EngineClosed | EngineFailed:
        if self._failure is None:
            return EngineClosed("the engine has stopped")
        error = EngineFailed(f"the engine broke down: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _work(self) -> None:
        """The engine's thread."""
        try:
            while not self._stopping:
                self._obey(wait=not self.engine.has_work)
                if not self._stopping:
                    self._deliver(self.engine.step())
            self._deliver({number: last for number in self._tickets if (last := self.engine.abort(number)) is not None}, now=True)
        except BaseException as error:
            self._failure = error
            for ticket in self._tickets.values():
                _call(ticket.loop, ticket.fail, error)
            self._tickets.clear()
        with self._gate:
            self._accepts = self._obeys = False
        while not self._commands.empty():
            command = self._commands.get()
            if command.done.set_running_or_notify_cancel():
                command.done.set_exception(self._refusal())

    def _obey(self, wait: bool) -> None:
        """Run all commands; with `wait`, at least one."""
        while wait or not self._commands.empty():
            command, wait = self._commands.get(), False
            if not command.done.set_running_or_notify_cancel():
                continue
            try:
                command.function()
            except Exception as error:  # a request that cannot be served, say: the business of who sent it
                command.done.set_exception(error)
            else:
                command.done.set_result(None)

    def _deliver(self, increments: dict[int, Increment], *, now: bool = False) -> None:
        """Send increments to their readers, unless those got some a moment ago and can wait for the next steps."""
        for number, increment in increments.items():
            self._mail[number].append(increment)
        clock = time.monotonic()
        if not now and self.engine.has_work and clock - self._delivered < DELIVERY_SECONDS:
            return
        self._delivered = clock
        gather = min(GATHER_SECONDS * max(len(self._tickets) - PROMPT_READERS, 0), MOST_GATHER_SECONDS)
        post: defaultdict[asyncio.AbstractEventLoop, list[tuple[Ticket, list[Increment]]]] = defaultdict(list)
        for number, letters in list(self._mail.items()):
            ticket = self._tickets.get(number)
            if ticket is None:
                del self._mail[number]
                continue
            ends = letters[-1].finish_reason is not None
            if ends:
                del self._tickets[number]
            elif clock < ticket.due:
                continue
            ticket.due = clock + gather
            post[ticket.loop].append((ticket, self._mail.pop(number)))
        for loop, bags in post.items():
            if not _call(loop, _put_all, bags):
                for ticket, _ in bags:  # nobody is left to read them
                    self.cancel(ticket)


def _put_all(bags: list[tuple[Ticket, list[Increment]]]) -> None:
    for ticket, letters in bags:
        ticket.put(letters)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> bool:
    """Have `loop` call a function soon; False if it is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True
