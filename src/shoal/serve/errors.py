"""What clients are told when something is wrong, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from ..config import UserError
from ..engine import EngineClosed, EngineFailed

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class APIError(Exception):
    """An answer with an error status: `status`, what is wrong, which field (`param`), and a stable `code` for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None) -> APIError:
    """The request cannot be served as it is."""
    return APIError(400, message, param)


def too_long(message: str, param: str) -> APIError:
    """The prompt does not fit; agents look for this code to shorten it."""
    return APIError(400, message, param, "context_length_exceeded")


def busy() -> APIError:
    return APIError(429, "too many requests are waiting: try again in a moment", code="rate_limit_exceeded", retry_after=1)


def closing() -> APIError:
    return APIError(503, "the server is shutting down and takes no more requests", code="shutting_down", retry_after=5)


def loading() -> APIError:
    return APIError(503, "the model is still being loaded: try again in a moment", code="loading", retry_after=2)


def broken() -> APIError:
    return APIError(503, "the engine broke down: the server has to be started again", code="engine_failed")


def as_api_error(error: Exception) -> APIError | None:
    """What the engine's and Shoal's own errors are for a client; None for those nobody foresaw."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, UserError):
        return bad(str(error))
    if isinstance(error, EngineClosed):
        return closing()
    if isinstance(error, EngineFailed):
        return broken()
    return None
