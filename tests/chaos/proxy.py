"""A bad network between an operator and the API server: refused, slow, failing, lost, cut and silent answers.

A plain HTTP proxy that forwards as an administrator who impersonates the operator's user, so that permissions hold.
"""

import asyncio
import json
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.chaos.rules import Call, Cut, Delay, Hang, HangUp, Refuse, Rule, anything
from tests.chaos.streams import Echo, Stream, expired
from tests.cluster.apiserver import ApiServer

_HOP = frozenset({"host", "connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive"})
_REASONS = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


class FaultProxy:
    """An async context manager.

    Args:
        server: the API server.
        name: of the administrator, as which the audit log knows the requests: each replica can have its own.
        user: whom to impersonate, with `groups`.
        seed: of what is left to chance.
    """

    def __init__(self, server: ApiServer, name: str, user: str, groups: Sequence[str], seed: int = 0) -> None:
        self._server = server.url
        certificate, key = server.pki.issue(name, user=name, groups=["system:masters"])
        self._tls = ssl.create_default_context(cafile=str(server.pki.ca))
        self._tls.load_cert_chain(str(certificate), str(key))
        self._identity = [("Impersonate-User", user), *(("Impersonate-Group", group) for group in groups)]
        self.chance = random.Random(seed)  # noqa: S311 (faults are no secret)
        self.name = name
        self.rules: list[Rule] = []
        self.faults: Counter[str] = Counter()
        """What was done to requests and to events of watches."""
        self.calls: list[Call] = []
        """Every request that arrived."""
        self.echo: Echo | None = None
        """Makes duplicates and stale events of what the watches bring, while it is set."""
        self.expired: set[str] = set()
        """Paths whose next watch is told that its resourceVersion is too old."""
        self.silent = False
        """Watches that are open now, or opened from now on, stay open and bring nothing ever again."""
        self.url = ""
        self._streams: set[Stream] = set()

    async def __aenter__(self) -> "FaultProxy":
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False, read_bufsize=1 << 21)
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", self._handle)
        # A client that gives up ends its request here too, as it would without a proxy.
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for rule in self.rules:
            rule.over.set()
        self.break_watches()
        await self._runner.cleanup()
        await self._session.close()
        await asyncio.sleep(0.25)  # TLS connections say goodbye in the background; aiohttp offers nothing to await

    def write_kubeconfig(self, target: Path) -> Path:
        """A kubeconfig that leads through the proxy (JSON is YAML); returns its path."""
        cluster = {"name": "c", "cluster": {"server": self.url}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        user = {"name": "u", "user": {}}
        content = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
        target.write_text(json.dumps(content | {"clusters": [cluster], "contexts": [context], "users": [user]}))
        return target

    # -- troubles
    @asynccontextmanager
    async def trouble(self, *rules: Rule) -> AsyncIterator[None]:
        """Rules for a while; of several that meet a request the newest counts, and of these the first."""
        self.rules[:0] = rules
        try:
            yield
        finally:
            for rule in rules:
                self.rules.remove(rule)
                rule.over.set()

    @asynccontextmanager
    async def partition(self) -> AsyncIterator[None]:
        """Nothing comes and nothing goes, on open connections and on new ones."""
        self.silence()
        try:
            async with self.trouble(Rule(anything, Hang())):
                yield
        finally:
            self.speak()
            self.break_watches()  # what the other side sends into a connection that is gone is answered by a reset

    def silence(self) -> None:
        """Open watches are half-open from now on, and so are new ones until `speak`."""
        self.silent = True
        for stream in tuple(self._streams):
            stream.dead = True

    def speak(self) -> None:
        """New watches work again; those that are dead stay so."""
        self.silent = False

    def break_watches(self) -> None:
        """Cut the connections of all open watches."""
        for stream in tuple(self._streams):
            stream.hang_up()

    def expire(self) -> None:
        """Tell each watch that is open now, at its next request, that what it missed is no longer known."""
        self.expired |= {stream.path for stream in self._streams}

    @property
    def watching(self) -> int:
        """Watches that are open."""
        return len(self._streams)

    def busiest(self, since: float, seconds: float) -> int:
        """The most requests that came within so many seconds, since a time of the event loop."""
        times = [call.at for call in self.calls if call.at >= since]
        first, most = 0, 0
        for last, at in enumerate(times):
            while at - times[first] > seconds:
                first += 1
            most = max(most, last - first + 1)
        return most

    # -- requests
    async def _handle(self, request: web.Request) -> web.StreamResponse:
        watch = request.query.get("watch") in ("1", "true")
        call = Call(asyncio.get_running_loop().time(), request.method, request.path, watch)
        self.calls.append(call)
        rule = next((rule for rule in self.rules if rule.strikes(call, self.chance)), None)
        if rule is not None:
            self.faults[type(rule.trouble).__name__] += 1
        try:
            return await self._answer(request, call, rule)
        except (aiohttp.ClientError, OSError):
            return _hang_up(request)  # the API server went, or the client

    async def _answer(self, request: web.Request, call: Call, rule: Rule | None) -> web.StreamResponse:
        match rule.trouble if rule is not None else None:
            case Refuse(statuses):
                return _refusal(self.chance.choice(statuses))
            case Hang(carried_out) | HangUp(carried_out) as trouble:
                if carried_out:
                    await self._carry_out(request)
                if isinstance(trouble, Hang) and rule is not None:
                    await rule.over.wait()
                return _hang_up(request)
            case Delay(seconds):
                await asyncio.sleep(seconds)
        if call.watch:
            return await self._watch(request, cut=rule is not None and isinstance(rule.trouble, Cut))
        status, headers, body = await self._carry_out(request)
        response = web.StreamResponse(status=status)
        for name, value in headers:
            response.headers.add(name, value)
        await response.prepare(request)
        if rule is not None and isinstance(rule.trouble, Cut):
            await response.write(body[: len(body) // 2])
            return _hang_up(request)
        await response.write(body)
        await response.write_eof()
        return response

    async def _carry_out(self, request: web.Request) -> tuple[int, list[tuple[str, str]], bytes]:
        kept = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP]
        sent = await request.read()
        async with self._session.request(
            request.method,
            self._server + request.raw_path,
            headers=[*kept, *self._identity],
            data=sent or None,
            timeout=aiohttp.ClientTimeout(total=None),
        ) as answer:
            body = await answer.read()
            headers = [(n, v) for n, v in answer.headers.items() if n.lower() not in _HOP - {"content-encoding"}]
            return answer.status, headers, body

    async def _watch(self, request: web.Request, *, cut: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if request.path in self.expired:
            self.expired.discard(request.path)
            self.faults["Expired"] += 1
            await response.prepare(request)
            await response.write(expired())
            await response.write_eof()
            return response
        plain = [*self._identity, ("Accept", "application/json"), ("Accept-Encoding", "identity")]
        async with self._session.get(
            self._server + request.raw_path, headers=plain, timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            response.set_status(answer.status)
            await response.prepare(request)
            stream = Stream(request, response, dead=self.silent, cut=cut, faults=self.faults)
            self._streams.add(stream)
            try:
                async for line in answer.content:
                    await stream.pass_on(line, self.echo)
            finally:
                self._streams.discard(stream)
            await response.write_eof()
            return response


def _refusal(status: int) -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else {}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": _REASONS[status], "code": status}
    return web.json_response({**body, "message": "injected"}, status=status, headers=headers)


def _hang_up(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
