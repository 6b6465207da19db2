"""The loop that an engine works in, for whoever asks: commands in, news out, both plain data that can go to another process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import UserError
from .engine import Engine, EngineStats
from .requests import Increment, Request, join

DELIVERY_SECONDS = 0.01
"""Steps faster than this are told together: waking every reader for every token would cost a small model half its speed."""
PROMPT_READERS = 8
"""So many answers are told as fast as that."""
GATHER_SECONDS, MOST_GATHER_SECONDS = 0.003, 0.2
"""For every answer beyond those, tokens wait longer for each other: passing on a piece of text costs a server about as much as computing
one token of a small model."""
MASK_MAKERS = 2
"""Masks that are made at the same time."""


class Add(NamedTuple):
    """Serve a request. `key` is what the asker calls it."""

    key: int
    request: Request


class Cancel(NamedTuple):
    """End a request and free its pages; nothing happens if there is none with this key."""

    key: int


class Stop(NamedTuple):
    """Leave the loop; answers that are not finished end with reason `abort`."""


Command = Add | Cancel | Stop


class News(NamedTuple):
    """What happened since the last news."""

    decided: list[tuple[int, Exception | None]]
    """Requests that were accepted (None) or refused."""
    increments: list[tuple[int, Increment]]
    """By key. Steps told together are joined here, as every object on its way to another process costs time."""
    stats: EngineStats


def as_told(error: BaseException) -> Exception:
    """An error as another process can be told it: whoever hears may not know its class."""
    return error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")


class Worker:
    """Works for one asker, who hears by `tell`."""

    def __init__(self, engine: Engine, tell: Callable[[News], None]) -> None:
        self._engine, self._tell = engine, tell
        self._numbers: dict[int, int] = {}
        """Of requests in the engine, by key."""
        self._keys: dict[int, int] = {}
        """The other way round."""
        self._decided: list[tuple[int, Exception | None]] = []
        self._mail: defaultdict[int, list[Increment]] = defaultdict(list)
        """What is still to be told, by key."""
        self._due: dict[int, float] = {}
        """When more of an answer may be told (by the monotonic clock); its beginning and end are at once."""
        self._told = 0.0
        """When news were told last."""
        self._makers = ThreadPoolExecutor(MASK_MAKERS, "shoal-mask")
        self._making: dict[int, tuple[Request, Future[Any]]] = {}
        """Requests, by key, whose masks are being made: that may take long, and the others shall not wait for it."""

    def run(self, take: Callable[[bool], Iterable[Command]]) -> None:
        """Obey and compute until told to stop. `take(wait)` gives the commands there are, at least one with `wait`."""
        while self._obey(take(not self._engine.has_work and not self._making)):
            if not self._engine.has_work:
                wait([mask for _, mask in self._making.values()], DELIVERY_SECONDS, FIRST_COMPLETED)
            self._add_made()
            self._collect(self._engine.step())
            if self._decided or not self._engine.has_work or time.monotonic() - self._told >= DELIVERY_SECONDS:
                self._report()
        self._makers.shutdown(wait=False, cancel_futures=True)
        self._collect({number: last for number in self._keys if (last := self._engine.abort(number)) is not None})
        self._report()

    def _obey(self, commands: Iterable[Command]) -> bool:
        """False where one of them was to stop."""
        for command in commands:
            if isinstance(command, Stop):
                return False
            if isinstance(command, Add):
                key, request = command
                if request.mask is None or self._engine.make_mask is None:
                    self._decided.append((key, self._add(key, request)))
                else:
                    self._making[key] = request, self._makers.submit(self._engine.make_mask, request.mask)
            elif (made := self._making.pop(command.key, None)) is not None:
                made[1].cancel()
            elif (number := self._numbers.get(command.key)) is not None:
                self._engine.abort(number)
                self._forget(command.key)
        return True

    def _add_made(self) -> None:
        """Add the requests whose masks are there."""
        for key in [key for key, (_, mask) in self._making.items() if mask.done()]:
            request, mask = self._making.pop(key)
            error = mask.exception()
            self._decided.append((key, as_told(error) if error is not None else self._add(key, replace(request, mask=mask.result()))))

    def _add(self, key: int, request: Request) -> Exception | None:
        try:
            number = self._engine.add_request(request)
        except Exception as error:  # a request that cannot be served, say: the business of who sent it
            return as_told(error)
        self._numbers[key], self._keys[number], self._due[key] = number, key, 0.0
        return None

    def _collect(self, increments: dict[int, Increment]) -> None:
        for number, increment in increments.items():
            self._mail[self._keys[number]].append(increment)

    def _report(self) -> None:
        """Tell what is due."""
        clock = self._told = time.monotonic()
        due = clock + min(GATHER_SECONDS * max(len(self._keys) - PROMPT_READERS, 0), MOST_GATHER_SECONDS)
        increments = []
        for key, letters in list(self._mail.items()):
            ends = letters[-1].finish_reason is not None
            if ends or clock >= self._due[key]:
                self._due[key] = due
                increments.append((key, join(self._mail.pop(key))))
            if ends:
                self._forget(key)
        decided, self._decided = self._decided, []
        self._tell(News(decided, increments, self._engine.stats()))

    def _forget(self, key: int) -> None:
        del self._keys[self._numbers.pop(key)], self._due[key]
        self._mail.pop(key, None)
