"""Server-sent events that notice when nobody listens any more, and keep idle connections alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..finite import finite
from .errors import APIError, as_api_error

T = TypeVar("T")
KEEP_ALIVE_SECONDS = 15.0
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def dumps(value: Any) -> str:
    """Compact JSON, with null for numbers that it cannot hold, which Python reads in what clients send."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))


def event(value: Any, name: str | None = None) -> bytes:
    """One event with JSON data."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(value)}\n\n".encode(errors="replace")


class JSON(Response):
    """JSON with what clients sent in it, half surrogates and all."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode(errors="replace")


class EventStream(Response):
    """Sends what `events` yields; `b""` is waited for but not sent.

    The first item decides: an `APIError` (or one of Shoal's own errors) before it becomes a plain error response, one after it an
    event made by `failed`. When the client hangs up, `events` is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], failed: Callable[[APIError], bytes]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._failed = events, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_until_gone(receive))
        pump = asyncio.ensure_future(self._pump(send))
        try:
            await asyncio.wait((gone, pump), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, pump):
                if not task.done():
                    task.cancel()
            results = await asyncio.gather(gone, pump, return_exceptions=True)
            await self._events.aclose()
        if isinstance(results[1], Exception) and not isinstance(results[1], OSError):
            raise results[1]

    async def _pump(self, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if first:
            await send({"type": "http.response.body", "body": first, "more_body": True})
        alive = asyncio.ensure_future(_keep_alive(send))
        try:
            async for item in self._events:
                if item:
                    await send({"type": "http.response.body", "body": item, "more_body": True})
        except Exception as error:
            told = as_api_error(error)
            if told is None:
                raise
            await send({"type": "http.response.body", "body": self._failed(told), "more_body": True})
        finally:
            alive.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it when the client hangs up. Raises `APIError` 499 then, which nobody reads."""
    gone = asyncio.ensure_future(_until_gone(request.receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((gone, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client hung up")
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _keep_alive(send: Send) -> None:
    while True:
        await asyncio.sleep(KEEP_ALIVE_SECONDS)
        await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
