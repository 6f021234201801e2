"""The port to the runners' supervisors: tasks out, reports in."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from pydantic import ValidationError

from mlx_operator_api import names
from mlx_operator_api.tasks import HEARTBEAT_SECONDS, TaskAnswer, TaskRequest

CONNECT_SECONDS = 2.0
TASK_SECONDS = 10.0
SILENCE_SECONDS = 2.25 * HEARTBEAT_SECONDS
"""A report stream on which two heartbeats are missing is dead, whatever TCP says; dialled again, it has the rest of
`deadlines.unreachable` for its next word."""
_KEEP_SECONDS = 2.0
"""How long a task's connection waits for the next task: longer, and there would be a second one for each runner."""
_MAX_TEXT = 200
_LINE_BYTES = 1 << 20


class RunnerError(Exception):
    """A supervisor that did not answer as the protocol says. `status` is the HTTP status, 0 without an answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class RunnerPort:
    """Speaks the control protocol to any pod."""

    def __init__(self) -> None:
        # No proxies from the environment: pods are reached directly or not at all. Streams hold one connection each.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
            trust_env=False,
            read_bufsize=_LINE_BYTES,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def send(self, pod_ip: str, token: str, request: TaskRequest) -> TaskAnswer:
        """POST a task.

        Raises:
            RunnerError: no answer, or not the answer that the protocol promises.
        """
        body = request.model_dump_json(by_alias=True)
        headers = {**_authorization(token), "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=TASK_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with self._session.post(
                _url(pod_ip, "tasks"), data=body, headers=headers, timeout=timeout
            ) as response:
                data = await response.read()
                if response.status != 200:
                    raise RunnerError(response.status, _http(response.status, data))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RunnerError(0, describe(error)) from error
        try:
            return TaskAnswer.model_validate_json(data)
        except ValidationError as error:
            raise RunnerError(200, f"the answer cannot be decoded: {first_error(error)}") from error

    @asynccontextmanager
    async def reports(self, pod_ip: str, token: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open the report stream; yields its lines. It ends, or raises, when the supervisor goes or falls silent.

        Raises:
            RunnerError: HTTP says no.
            aiohttp.ClientError, OSError, TimeoutError: no connection, lost, or silent for `SILENCE_SECONDS`.
            ValueError: a line longer than 1 MiB.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        async with self._session.get(
            _url(pod_ip, "reports"), headers=_authorization(token), timeout=timeout
        ) as response:
            if response.status != 200:
                data = await response.content.read(_MAX_TEXT)
                raise RunnerError(response.status, _http(response.status, data))
            yield aiter(response.content)


def describe(error: BaseException) -> str:
    """A connection error in one short line."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, aiohttp.SocketTimeoutError):
        # A stopped process and a broken network look the same here: what was observed has to do.
        return f"no word on its report stream for {SILENCE_SECONDS:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0
        why = os.strerror(number) if number > 0 else str(error.os_error)
        return f"cannot connect to {error.host}:{error.port}: {why}"[:_MAX_TEXT]
    text = str(error)
    return f"{type(error).__name__}: {text}"[:_MAX_TEXT] if text else type(error).__name__


def first_error(error: ValidationError) -> str:
    """Field and words of the first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    # The words that would have been right are a long list, and of this release.
    words = f"{first['input']!r} is no word of this release" if first["type"] == "enum" else first["msg"]
    return f"{where}: {words}"[:_MAX_TEXT]


def _http(status: int, data: bytes) -> str:
    return f"HTTP {status}: {data[:_MAX_TEXT].decode(errors='replace').strip()}"


def _authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _url(pod_ip: str, path: str) -> str:
    host = f"[{pod_ip}]" if ":" in pod_ip else pod_ip
    return f"http://{host}:{names.CONTROL_PORT}/{path}"
