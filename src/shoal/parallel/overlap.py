"""Two halves of a micro-batch in turns: while the tokens of one travel, the other computes.

Each half makes its forward and backward pass in a thread of its own, but only one of them computes at a time: a half that has sent its
rows off hands over to the other, and goes on when it gets its turn back. Exchanges happen in one more thread, one after the other. Where a
half hands over depends on nothing but the model, so every process makes its exchanges in the same order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Halves:
    """Runs two functions in turns, and is the courier (`dispatch.Courier`) at whose calls they change."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._whose = 0
        self._left: set[int] = set()
        self._half = threading.local()
        self._carrier = ThreadPoolExecutor(1, "exchange")
        self.exposed_seconds = 0.0
        """Time that the halves waited for exchanges, since it was last set to 0."""

    def __call__(self, exchange: Callable[[], T]) -> T:
        """Carry out `exchange` while the other half computes; at once outside of `run`."""
        half = getattr(self._half, "number", None)
        if half is None:
            return self._waited(exchange)
        future = self._carrier.submit(exchange)
        self._hand_over(half)
        return self._waited(future.result)

    def _waited(self, result: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return result()
        finally:
            self.exposed_seconds += time.perf_counter() - began

    def _hand_over(self, half: int) -> None:
        with self._turn:
            if 1 - half not in self._left:
                self._whose = 1 - half
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._whose == half)

    def run(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """Both results; an error in one of the two is raised once both have ended."""
        self._whose, self._left = 0, set()
        with ThreadPoolExecutor(2, "half") as halves:
            futures = [halves.submit(self._run_half, number, work) for number, work in enumerate((first, second))]
            return futures[0].result(), futures[1].result()

    def _run_half(self, number: int, work: Callable[[], T]) -> T:
        self._half.number = number
        with self._turn:
            self._turn.wait_for(lambda: self._whose == number)
        try:
            return work()
        finally:
            with self._turn:
                self._left.add(number)
                self._whose = 1 - number
                self._turn.notify_all()
