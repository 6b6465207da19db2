"""What every request passes before it reaches a route: size, API key, and a line in the log after it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError
from .host import Host
from .sse import JSON

LOG = logging.getLogger("shoal.serve")
OPEN_PATHS = ("/", "/health")
"""Served without a key; so is the page, which asks for one."""
PAGE = "/page/"
QUIET_PATHS = ("/health", "/metrics", "/page", "/page/")
"""Asked for again and again: not worth a line in the log."""


class Keys:
    """API keys, compared in a time that tells nothing about them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: str) -> bool:
        """Every key is looked at, whichever fits."""
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class Guard:
    """ASGI middleware. Bodies beyond `most_bytes` are refused with 413 as soon as that is known."""

    def __init__(self, app: ASGIApp, host: Host, keys: Keys, most_bytes: int) -> None:
        self._app, self._host, self._keys, self._most_bytes = app, host, keys, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, started = time.perf_counter(), 500, False

        async def watched_send(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(receive), watched_send)
        except APIError as error:
            if not started:
                await error_response(scope["path"], error)(scope, receive, watched_send)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._host.metrics.count_request(path, status)
            level = logging.DEBUG if path in QUIET_PATHS else logging.INFO
            LOG.log(level, "%s %s %d %.0f ms", scope["method"], path, status, 1000 * (time.perf_counter() - began))

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if self._keys and path not in OPEN_PATHS and not path.startswith(PAGE) and not self._keys.accept(_key(headers)):
            raise APIError(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise APIError(415, "the body is not announced as JSON: send it with the header Content-Type: application/json")

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> APIError:
        return APIError(413, f"the request is larger than {self._most_bytes / 1e6:g} MB", code="request_too_large")


def error_response(path: str, error: APIError) -> JSON:
    """In the shape that the clients of this path expect."""
    body = error.body()
    if path.startswith("/v1/messages"):
        body = {"type": "error", "error": {"type": error.type, "message": error.message}}
    return JSON(body, error.status, error.headers)


def _key(headers: Headers) -> str:
    """As OpenAI's or as Anthropic's clients send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
