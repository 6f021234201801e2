"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from aiohttp import web

from .tickets import RETRY_SECONDS

_RETRIED = frozenset({429, 503})
_TYPES = {
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """Anything but an answer. `retry` says whether it is worth trying again."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """The HTTP answer."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in _RETRIED else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.json_response(self.body(), status=self.status, headers=headers)


def unsupported(param: str, value: object, hint: str) -> ApiError:
    """A field or value that this runner does not do: never silently ignored."""
    return ApiError(400, f"{param}={_short(value)} is not supported: {hint}", code="unsupported_parameter", param=param)


def invalid(param: str, message: str) -> ApiError:
    """A field that is wrong."""
    return ApiError(400, f"{param}: {message}", code="invalid_value", param=param)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
