"""The served model: loading, ready, draining; and the one way in to its engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from typing import TypeVar

from ..config import ServeCommand
from ..data import Tokenizer
from ..data.chat_template import read_template
from ..engine import AsyncEngine, Increment, Place, Request
from ..engine.async_engine import Ticket
from .errors import APIError, bad, broken, busy, closing, loading, too_long
from .grammar_trial import Trial
from .metrics import Metrics

LOG = logging.getLogger("shoal.serve")
Load = Callable[[threading.Event], tuple[Place, Tokenizer]]
"""Gives up where the event is set meanwhile."""
T = TypeVar("T")
TEXT_READERS = 2
"""Requests whose texts are turned into tokens at the same time."""


class State(str, Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Host:
    """Owns the engine. `start` loads the model beside the event loop, `drain` ends everything in good order.

    `name` is what clients call the model.
    """

    def __init__(self, command: ServeCommand, name: str, load: Load) -> None:
        self.command, self.name = command, name
        self.metrics = Metrics()
        self.created = int(time.time())
        self.failure: Exception | None = None
        self._load = load
        self._engine: AsyncEngine | None = None
        self._tokenizer: Tokenizer | None = None
        self._trial: Trial | None = None
        self._leaving = threading.Event()
        """Set: nothing new is begun."""
        self._readers = ThreadPoolExecutor(TEXT_READERS, "shoal-text")

    @property
    def state(self) -> State:
        if self.failure is not None:
            return State.FAILED
        if self._leaving.is_set():
            return State.DRAINING
        if self._engine is None:
            return State.LOADING
        return State.READY if self._engine.is_accepting else State.FAILED

    @property
    def in_flight(self) -> int:
        """Requests that the engine has not finished."""
        return 0 if self._engine is None else self._engine.unfinished

    @property
    def engine(self) -> AsyncEngine:
        """Raises `APIError` 503 unless the model is loaded and takes requests."""
        if self._leaving.is_set():
            raise closing()
        if self.failure is not None or (self._engine is not None and not self._engine.is_accepting):
            raise broken()
        if self._engine is None:
            raise loading()
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise loading()
        return self._tokenizer

    @property
    def trial(self) -> Trial:
        if self._trial is None:
            raise loading()
        return self._trial

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.context

    async def start(self) -> None:
        """Load the model; where that fails, `failure` says why."""
        try:
            place, tokenizer = await asyncio.to_thread(self._load, self._leaving)
            if self.command.chat_template is not None:
                tokenizer = Tokenizer(tokenizer.json, tokenizer.config, read_template(self.command.chat_template))
            self._tokenizer = tokenizer
            self._trial = Trial(tokenizer, place.config.vocab_size)
            self._engine = AsyncEngine(place)
            self.metrics.watch(self._engine.stats)
        except Exception as error:
            if not self._leaving.is_set():
                self.failure = error
            raise

    async def drain(self) -> None:
        """Refuse new requests, let those there are end within the time of grace, stop the engine."""
        self._leaving.set()
        if self._engine is not None:
            await self._engine.drain(self.command.grace)

    async def close(self) -> None:
        """Stop at once; unfinished answers end with reason `abort`."""
        self._leaving.set()
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._trial is not None:
            self._trial.close()
        if self._engine is not None:
            await self._engine.close()

    async def read(self, encode: Callable[[], T]) -> T:
        """What `encode` makes of a client's text, beside the event loop: a megabyte takes the better part of a second."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, encode)

    def check_model(self, name: str | None) -> None:
        """Raises `APIError` 404 if a client asks for another model than the one there is."""
        if name is not None and name != self.name:
            raise APIError(404, f"there is no model {name[:100]!r} here: use {self.name!r}", "model", "model_not_found")

    def check_prompt(self, prompt: Sequence[int], param: str) -> None:
        """Raises `APIError` 400 if there is no room for an answer behind `prompt`, which came in the field `param`."""
        if not prompt:
            raise bad("the prompt is empty: give at least one token", param)
        if len(prompt) >= self.context:
            raise too_long(f"the prompt has {len(prompt)} tokens, the model sees {self.context}: shorten it", param)

    def log_prompt(self, prompt: Sequence[int]) -> None:
        """Write what a client sent to the log, where that was asked for."""
        if self.command.log_prompts:
            LOG.info("prompt: %r", self.tokenizer.decode(list(prompt), skip_special=False))

    @contextlib.asynccontextmanager
    async def serving(self, requests: Sequence[Request]) -> AsyncIterator[list[Ticket]]:
        """The requests in the engine; at the end of the block, whatever is unfinished is cancelled and its pages are free.

        Raises:
            APIError: 429 if too many are waiting.
            UserError, EngineClosed, EngineFailed: as `AsyncEngine.submit`.
        """
        engine, options = self.engine, self.command
        if self.in_flight and self.in_flight + len(requests) > options.engine.max_running + options.max_waiting:
            raise busy()
        for prompt in dict.fromkeys(tuple(request.prompt) for request in requests):
            self.log_prompt(prompt)
        tickets = await engine.submit_all(requests)
        try:
            yield tickets
        finally:
            for ticket in tickets:
                engine.cancel(ticket)

    async def increments(self, tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Increment]]:
        """What arrives for any of the tickets, with its place among them, until all have ended; all that is there at once."""
        if len(tickets) == 1:
            ended = False
            while not ended:
                increment = await tickets[0].take()
                ended = increment.finish_reason is not None
                yield 0, increment
            return
        waiting = {asyncio.ensure_future(ticket.take()): index for index, ticket in enumerate(tickets)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = waiting.pop(task)
                    increment = task.result()
                    if increment.finish_reason is None:
                        waiting[asyncio.ensure_future(tickets[index].take())] = index
                    yield index, increment
        finally:
            for task in waiting:
                task.cancel()


def numbered(request: Request, index: int) -> Request:
    """The same request for the choice with this index: another seed."""
    seed = request.sampling.seed
    return request if not index or seed is None else replace(request, sampling=replace(request.sampling, seed=(seed + index) % 2**64))
