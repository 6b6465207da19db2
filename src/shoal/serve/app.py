"""The routes: which path leads to which function."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from .. import __version__
from . import about, chat, completions, embeddings, messages, responses
from .errors import APIError, as_api_error
from .guard import Guard, Keys, error_response
from .host import Host
from .messages import CountBody, MessagesBody
from .protocol import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from .responses import ResponsesBody

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""The page loads nothing from anywhere else, whatever a model writes."""
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
"""`/metrics` is Shoal's own; looking for another's takes 4% of a request. Versions of FastAPI without it pass over the setting."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be served as it is."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "There is no such model."},
    413: {"description": "The request is too large."},
    415: {"description": "The body is not announced as JSON."},
    429: {"description": "Too many requests are waiting."},
    503: {"description": "The model is being loaded, or the server is shutting down."},
}


def make_app(host: Host) -> FastAPI:
    """The ASGI application that serves `host`, which it loads when it starts."""
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.staticfiles import StaticFiles

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(host.start())
        loading.add_done_callback(_look_at)
        yield
        await asyncio.wait([loading])
        await host.close()

    app = FastAPI(title="Shoal", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)

    async def invalid(request: Request, error: Exception) -> Response:
        # The second where one API's request is written as another's, which knows more limits.
        assert isinstance(error, RequestValidationError | ValidationError)
        return error_response(request.url.path, _explain(error.errors()))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # While a body is read, APIErrors arrive wrapped.
        cause = error.__cause__
        told = cause if isinstance(cause, APIError) else APIError(error.status_code, str(error.detail))
        response = error_response(request.url.path, told)
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        assert told is not None
        return error_response(request.url.path, told)

    async def unforeseen(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, APIError(500, "the server failed on this request; its log says why"))

    from ..config import UserError
    from ..engine import EngineClosed, EngineFailed

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (APIError, UserError, EngineClosed, EngineFailed):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(Exception, unforeseen)
    _add_routes(app, host)
    if not host.command.api_only:
        _add_page(app, StaticFiles)
    app.add_middleware(Guard, host=host, keys=Keys(host.command.keys()), most_bytes=int(host.command.max_body_mb * 1e6))
    if host.command.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=list(host.command.cors_origin), allow_methods=["*"], allow_headers=["*"])
    return app


def _add_routes(app: FastAPI, host: Host) -> None:
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await chat.create(host, body, request)

    async def text_completions(body: CompletionBody, request: Request) -> Response:
        return await completions.create(host, body, request)

    async def embed(body: EmbeddingBody, request: Request) -> Response:
        return await embeddings.create(host, body, request)

    async def anthropic(body: MessagesBody, request: Request) -> Response:
        return await messages.create(host, body, request)

    async def count_tokens(body: CountBody) -> Response:
        return await messages.count(host, body)

    async def respond(body: ResponsesBody, request: Request) -> Response:
        return await responses.create(host, body, request)

    async def tokenize(body: TokenizeBody) -> Response:
        return await about.tokenize(host, body)

    async def detokenize(body: DetokenizeBody) -> Response:
        return await about.detokenize(host, body)

    async def models() -> Response:
        return about.models(host)

    async def model(name: str) -> Response:
        host.check_model(name)
        return about.JSON(about.describe(host))

    async def health() -> Response:
        return about.health(host)

    async def version() -> Response:
        return about.version()

    async def metrics() -> Response:
        return Response(host.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    posts: dict[str, Callable[..., Coroutine[Any, Any, Response]]] = {
        "/v1/chat/completions": chat_completions,
        "/v1/completions": text_completions,
        "/v1/embeddings": embed,
        "/v1/messages": anthropic,
        "/v1/messages/count_tokens": count_tokens,
        "/v1/responses": respond,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets: dict[str, Callable[..., Coroutine[Any, Any, Response]]] = {
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/health": health,
        "/version": version,
        "/metrics": metrics,
    }
    for method, routes in (("POST", posts), ("GET", gets)):
        for path, endpoint in routes.items():
            app.add_api_route(path, endpoint, methods=[method], responses=REFUSALS, response_model=None)


def _add_page(app: FastAPI, static_files: type) -> None:
    async def root() -> Response:
        return RedirectResponse("/page/")

    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    app.add_api_route("/", root, include_in_schema=False, response_model=None)
    app.add_api_route("/page/", index, include_in_schema=False, response_model=None)
    app.mount("/page", static_files(directory=PAGE))


def _explain(errors: Any) -> APIError:
    """The first complaint, in one line."""
    first: dict[str, Any] = errors[0] if errors else {"msg": "the request is not valid", "loc": ()}
    place = ".".join(str(part) for part in first["loc"] if part != "body" and not str(part).startswith(("function-", "constrained-")))
    if first.get("type") == "json_invalid":
        return APIError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    message = f"{place or 'the body'}: {first['msg']}"
    return APIError(400, message[:500], place[:200] or None)


def _look_at(task: asyncio.Task[None]) -> None:
    """A failure to load is kept in the host: nobody else has to be told."""
    if not task.cancelled():
        task.exception()
