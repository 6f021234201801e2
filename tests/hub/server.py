"""The server: model info, resolve with a redirect for large files, ranges, etags, and the errors of the real one.

Source: https://huggingface.co/docs/hub/api, and what huggingface_hub reads of each answer.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.hub.faults import Fault, Kind
from tests.hub.repository import Blob, Repository

_CHUNK = 16 * 1024
_CDN = "/cdn-lfs"


@dataclass
class Served:
    """One request and what became of it."""

    method: str
    path: str
    start: int = 0
    """Of the range that was asked for."""
    authorization: str | None = None
    host: str = ""
    status: int = 0
    sent: int = 0
    """Bytes of the body that were handed to the connection."""
    begun: float = field(default_factory=time.monotonic)
    ended: float = 0.0


_SERVED = web.RequestKey("served", Served)


@dataclass
class Hub:
    """A hub at `url`. Change `repositories` and `faults` while it runs; `served` says what was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    """Origin of the redirects of large files; another one than `url`, as with the real hub."""
    metadata: bool = True
    """Off: a mirror whose lists have names only."""
    bytes_per_second: float | None = None
    """Of each body."""

    def sent(self, part: str) -> int:
        """Bytes sent in answers whose path contains this."""
        return sum(request.sent for request in self.served if part in request.path)

    def requests(self, part: str, method: str = "GET") -> list[Served]:
        return [request for request in self.served if part in request.path and request.method == method]

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something that was asked or sent."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.02)

    # -- answers
    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._log])
        application.router.add_get("/api/models/{org}/{name}", self._info)
        application.router.add_get("/api/models/{org}/{name}/revision/{revision:.+}", self._info)
        application.router.add_get("/{org}/{name}/resolve/{revision}/{file:.+}", self._resolve)
        application.router.add_get(_CDN + "/{org}/{name}/{commit}/{file:.+}", self._large)
        application.router.add_get("/_served", self._tell_served)
        application.router.add_put("/_faults", self._set_faults)
        return application

    @web.middleware
    async def _log(self, request: web.Request, handler: Any) -> web.StreamResponse:
        served = Served(
            request.method,
            request.path,
            request.http_range.start or 0,
            request.headers.get("Authorization"),
            request.host,
        )
        request[_SERVED] = served
        if request.path.startswith("/_"):
            own: web.StreamResponse = await handler(request)
            return own
        self.served.append(served)
        try:
            answer: web.StreamResponse = self._fault_answer(request) or await handler(request)
        except web.HTTPException as error:
            answer = error
        finally:
            served.ended = time.monotonic()
        served.status = answer.status
        return answer

    def _take(self, path: str, *kinds: Kind) -> Fault | None:
        fault = next((f for f in reversed(self.faults) if f.kind in kinds and f.matches(path)), None)
        if fault is not None:
            fault.times -= 1
        return fault

    def _fault_answer(self, request: web.Request) -> web.Response | None:
        fault = self._take(request.path, Kind.STATUS, Kind.NO_JSON)
        if fault is None:
            return None
        if fault.kind is Kind.NO_JSON:
            return web.Response(text="<html>please log in</html>", content_type="text/html")
        return _error(fault.status, fault.error_code, retry_after=fault.retry_after)

    def _repository(self, request: web.Request) -> Repository:
        found = self.repositories.get(f"{request.match_info['org']}/{request.match_info['name']}")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if found is None:
            # As the real one: who is not known cannot learn what exists.
            raise _AnsweredError(_error(404 if given else 401, "RepoNotFound"))
        if found.gated:
            raise _AnsweredError(_error(403 if given else 401, "GatedRepo"))
        if found.token is not None and given != found.token:
            raise _AnsweredError(_error(401, None if given else "RepoNotFound"))
        return found

    async def _info(self, request: web.Request) -> web.Response:
        try:
            repository = self._repository(request)
        except _AnsweredError as error:
            return error.answer
        commit = repository.resolve(request.match_info.get("revision", "main"))
        if commit is None:
            return _error(404, "RevisionNotFound")
        blobs = self.metadata and request.query.get("blobs", "").lower() == "true"
        siblings = [_sibling(name, found, blobs=blobs) for name, found in repository.commits[commit].items()]
        return web.json_response({"id": repository.name, "sha": commit, "siblings": siblings})

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        try:
            repository = self._repository(request)
        except _AnsweredError as error:
            return error.answer
        commit = repository.resolve(request.match_info["revision"])
        if commit is None:
            return _error(404, "RevisionNotFound")
        name = request.match_info["file"]
        found = repository.commits[commit].get(name)
        if found is None:
            return _error(404, "EntryNotFound", commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{found.etag}"'}
        if found.large:
            headers |= {"X-Linked-Etag": f'"{found.sha256}"', "X-Linked-Size": str(found.size)}
            place = f"{self.cdn}{_CDN}/{repository.name}/{commit}/{name}?Signature=secret"
            return web.Response(status=302, headers={**headers, "Location": place})
        return await self._body(request, found, headers)

    async def _large(self, request: web.Request) -> web.StreamResponse:
        repository = self.repositories[f"{request.match_info['org']}/{request.match_info['name']}"]
        found = repository.commits[request.match_info["commit"]][request.match_info["file"]]
        return await self._body(request, found, {"ETag": f'"{found.sha256}"'})

    async def _body(self, request: web.Request, found: Blob, headers: dict[str, str]) -> web.StreamResponse:
        content = self._content(request.path, found)
        served = request[_SERVED]
        start = 0 if self._take(request.path, Kind.NO_RANGES) else served.start
        if start and start >= len(content):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        answer = web.StreamResponse(status=206 if start else 200, headers={"Accept-Ranges": "bytes", **headers})
        answer.content_length = len(content) - start
        served.status = answer.status
        await answer.prepare(request)
        if request.method == "HEAD":
            return answer
        stop = self._take(request.path, Kind.RESET, Kind.STALL)
        await self._send(request, answer, content[start:], stop)
        return answer

    def _content(self, path: str, found: Blob) -> bytes:
        content = found.path.read_bytes()
        fault = self._take(path, Kind.TRUNCATED, Kind.CORRUPT)
        if fault is None:
            return content
        if fault.kind is Kind.TRUNCATED:
            return content[: -fault.cut]
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        return bytes(changed)

    async def _send(self, request: web.Request, answer: web.StreamResponse, content: bytes, stop: Fault | None) -> None:
        served = request[_SERVED]
        end = len(content) if stop is None else min(stop.after, len(content))
        while served.sent < end:
            part = content[served.sent : min(served.sent + _CHUNK, end)]
            await answer.write(part)
            served.sent += len(part)
            if self.bytes_per_second:
                await asyncio.sleep(len(part) / self.bytes_per_second)
        if stop is None:
            return
        transport = request.transport
        if stop.kind is Kind.RESET and transport is not None:
            transport.abort()
            return
        while transport is not None and not transport.is_closing():  # noqa: ASYNC110 (a stall waits for the other side)
            await asyncio.sleep(0.05)

    # -- from outside of the process
    async def _tell_served(self, _: web.Request) -> web.Response:
        return web.json_response([{**vars(served), "authorization": None} for served in self.served])

    async def _set_faults(self, request: web.Request) -> web.Response:
        self.faults = [Fault.model_validate(fault) for fault in await request.json()]
        return web.Response(status=204)


class _AnsweredError(Exception):
    def __init__(self, answer: web.Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


def _error(status: int, code: str | None, *, commit: str | None = None, retry_after: str | None = None) -> web.Response:
    headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "Retry-After": retry_after}
    return web.json_response(
        {"error": code or "no"}, status=status, headers={k: v for k, v in headers.items() if v is not None}
    )


def _sibling(name: str, found: Blob, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": name}
    lfs = {"sha256": found.sha256, "size": found.size, "pointerSize": 134}
    return {"rfilename": name, "size": found.size, "blobId": found.git, **({"lfs": lfs} if found.large else {})}


@contextlib.asynccontextmanager
async def serving(hub: Hub, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Hub]:
    """Let a hub listen; `url` and `cdn` are set."""
    runner = web.AppRunner(hub.application(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        number = runner.addresses[0][1]
        hub.url = f"http://{host}:{number}"
        # Another origin at the same place: only the name differs.
        hub.cdn = hub.cdn or (f"http://localhost:{number}" if host == "127.0.0.1" else hub.url)
        yield hub
    finally:
        await runner.cleanup()
