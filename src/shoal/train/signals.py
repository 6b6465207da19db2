"""SIGINT and SIGTERM as a request to finish the step, save and leave."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

ONE_REQUEST_SECONDS = 0.5
"""A process manager tells every process of a run to stop, and the one that started the others tells them too: that is one request."""


class StopRequest:
    """`asked` turns true on the first SIGINT or SIGTERM inside the context; a later one acts as it would have without us."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self._since is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > ONE_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
