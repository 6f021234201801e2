"""The control API, the report stream, probes and metrics (`names.CONTROL_PORT`, every rank)."""

import asyncio
import logging

from aiohttp import web
from pydantic import ValidationError

from mlx_operator_api.runner import SERVING
from mlx_operator_api.tasks import HEARTBEAT_SECONDS, RunnerReport, TaskRequest

from .http import BodyError, SlowClientError, read_body, write
from .metrics import Metrics
from .supervisor import BadTaskError, StaleLeaderError, Supervisor
from .tokens import Strangers, authorized

log = logging.getLogger(__name__)

MAX_TASK_BYTES = 1024 * 1024
MAX_BACKLOG = 4096
"""Reports that a slow reader may be behind before its stream is closed; it comes back and gets the current one."""
_NDJSON = "application/x-ndjson"


def readiness(supervisor: Supervisor) -> str | None:
    """Why this rank is not ready; None when it is.

    Rank 0 is ready when it takes new requests, also those it would hold while the group restarts: otherwise its
    Service would lose its endpoint, and clients their connection, at every restart in place.
    """
    report = supervisor.machine.report
    if report.draining:
        return "draining"
    if report.rank == 0:
        return supervisor.broker.refusal()
    return None if report.state in SERVING else f"state is {report.state}"


class Control:
    """Handlers of the control port."""

    def __init__(self, supervisor: Supervisor, metrics: Metrics) -> None:
        self._supervisor = supervisor
        self._metrics = metrics
        self._strangers = Strangers()
        self._ending = asyncio.Event()
        self._streams: set[asyncio.Queue[RunnerReport | None]] = set()

    def close(self) -> None:
        """End the report streams once they have told everything; new ones only tell the last report."""
        self._ending.set()
        for backlog in self._streams:
            if not backlog.full():
                backlog.put_nowait(None)

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(client_max_size=MAX_TASK_BYTES)
        app.add_routes(
            [
                web.post("/tasks", self.tasks),
                web.get("/report", self.report),
                web.get("/reports", self.reports),
                web.get("/metrics", self.metrics),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
            ]
        )
        return app

    async def tasks(self, request: web.Request) -> web.Response:
        """Decide on a task."""
        self._authorize(request)
        try:
            task = TaskRequest.model_validate_json(await read_body(request))
            answer = self._supervisor.handle(task)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            return _refused(400, f"the task cannot be decoded: {where}: {first['msg']}")
        except BadTaskError as error:
            log.warning("%s refused: %s", task.task.name, error)
            return _refused(400, str(error))
        except BodyError as error:
            return _refused(400, str(error))
        except StaleLeaderError as error:
            log.warning("%s refused: %s", task.task.name, error)
            return _refused(409, str(error))
        except SlowClientError as error:
            return _refused(408, str(error))
        self._metrics.told(answer)
        return web.Response(text=answer.model_dump_json(by_alias=True), content_type="application/json")

    async def report(self, request: web.Request) -> web.Response:
        """The current report."""
        self._authorize(request)
        return web.Response(text=_line(self._supervisor.heartbeat()), content_type="application/json")

    async def reports(self, request: web.Request) -> web.StreamResponse:
        """Every report from now on, and a heartbeat when nothing changes."""
        self._authorize(request)
        backlog: asyncio.Queue[RunnerReport | None] = asyncio.Queue(MAX_BACKLOG)
        overrun = asyncio.Event()

        def listener(report: RunnerReport) -> None:
            if backlog.full():
                overrun.set()
            else:
                backlog.put_nowait(report)

        response = web.StreamResponse(headers={"Content-Type": _NDJSON, "Cache-Control": "no-cache"})
        self._streams.add(backlog)
        unsubscribe = self._supervisor.machine.subscribe(listener)
        first = self._supervisor.heartbeat()  # before anything that the listener hears
        try:
            await response.prepare(request)
            await write(response, _line(first).encode() + b"\n")
            while not overrun.is_set() and (report := await self._next(backlog)) is not None:
                await write(response, _line(report).encode() + b"\n")
            if overrun.is_set():
                log.warning("a reader of reports is %d behind: its stream is closed", MAX_BACKLOG)
        except (SlowClientError, ConnectionError) as error:
            log.info("a report stream ended: %s", error or type(error).__name__)
        finally:
            unsubscribe()
            self._streams.discard(backlog)
        return response

    async def _next(self, backlog: "asyncio.Queue[RunnerReport | None]") -> RunnerReport | None:
        if self._ending.is_set() and backlog.empty():
            return None
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                return await backlog.get()
        except TimeoutError:
            # One that came in that very moment has a lower `seq` than a heartbeat made now.
            return self._supervisor.heartbeat() if backlog.empty() else backlog.get_nowait()

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def healthz(self, request: web.Request) -> web.Response:
        """The supervisor lives: an engine's death is its business, not the kubelet's."""
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        """Whether this rank is ready."""
        why = readiness(self._supervisor)
        return web.Response(status=503 if why else 200, text=f"{why or 'ok'}\n")

    def _authorize(self, request: web.Request) -> None:
        if not authorized(request.headers.get("Authorization"), self._supervisor.config.token):
            self._strangers.refused(request.remote)
            raise web.HTTPUnauthorized(
                headers={"WWW-Authenticate": "Bearer"}, text="the bearer token is missing or wrong\n"
            )


def _line(report: RunnerReport) -> str:
    return report.model_dump_json(by_alias=True, exclude_none=True)


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
