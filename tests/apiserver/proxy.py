"""A bad network between an operator and the API server: refused, failing, lost and cut answers.

A plain HTTP proxy that forwards as an administrator who impersonates the operator's user, so that permissions hold.
"""

import asyncio
import json
import random
import ssl
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from aiohttp import web

_HOP = frozenset({"host", "connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive"})
_REFUSALS = (429, 500, 503)


class FaultProxy:
    """An async context manager.

    Args:
        server: URL of the API server; `tls` holds an administrator's certificate.
        user: whom to impersonate, with `groups`.
        seed: of the faults.
    """

    def __init__(self, server: str, tls: ssl.SSLContext, user: str, groups: Sequence[str], seed: int) -> None:
        self._server = server
        self._tls = tls
        self._identity = [("Impersonate-User", user), *(("Impersonate-Group", group) for group in groups)]
        self._random = random.Random(seed)  # noqa: S311 (faults are no secret)
        self.rate = 0.0
        """Share of the requests that meet a fault."""
        self.faults: Counter[str] = Counter()
        self.url = ""

    async def __aenter__(self) -> "FaultProxy":
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False, read_bufsize=1 << 21)
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._session.close()
        await asyncio.sleep(0.25)  # TLS connections say goodbye in the background; aiohttp offers nothing to await

    def write_kubeconfig(self, target: Path) -> None:
        """A kubeconfig that leads through the proxy; JSON is YAML."""
        cluster = {"name": "c", "cluster": {"server": self.url}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        user = {"name": "u", "user": {}}
        content = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
        target.write_text(json.dumps(content | {"clusters": [cluster], "contexts": [context], "users": [user]}))

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        # The Lease has a deadline and tests of its own.
        fault = "leases" not in request.path and self._random.random() < self.rate
        kind = self._random.choice(("refuse", "drop", "lose", "cut")) if fault else ""
        if kind == "refuse":
            status = self._random.choice(_REFUSALS)
            self.faults[str(status)] += 1
            headers = {"Retry-After": "1"} if status == 429 else {}
            body = {"kind": "Status", "status": "Failure", "reason": "Injected", "message": "injected", "code": status}
            return web.json_response(body, status=status, headers=headers)
        if kind == "drop":
            self.faults["dropped"] += 1
            return self._hang_up(request)
        return await self._forward(request, kind)

    async def _forward(self, request: web.Request, kind: str) -> web.StreamResponse:
        kept = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP]
        body = await request.read()
        async with self._session.request(
            request.method,
            self._server + request.raw_path,
            headers=[*kept, *self._identity],
            data=body or None,
            timeout=aiohttp.ClientTimeout(total=None),
        ) as answer:
            if kind == "lose":
                await answer.content.readany()
                self.faults["lost"] += 1
                return self._hang_up(request)
            headers = [(n, v) for n, v in answer.headers.items() if n.lower() not in _HOP - {"content-encoding"}]
            response = web.StreamResponse(status=answer.status)
            for name, value in headers:
                response.headers.add(name, value)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                if kind == "cut":
                    self.faults["cut"] += 1
                    await response.write(chunk[: len(chunk) // 2])
                    return self._hang_up(request)
                await response.write(chunk)
            await response.write_eof()
            return response

    @staticmethod
    def _hang_up(request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()
