"""A kubelet whose pods live in its own process: the runner image's supervisor and control API, no engine processes.

The protocol on the wire, the decisions, the reports and the ways to fail are those of the image. Left out is what takes
time and memory without mattering to an operator: processes, the download's child, the watch of the engine, metrics.
Each pod has an address of 127.0.0.0/8 to itself.
"""

import asyncio
import gc
import random
import signal
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import Resource
from mlx_operator_api import names
from mlx_operator_api.base import format_time
from mlx_operator_api.runner import TaskName
from mlx_operator_api.tasks import DownloadModel, ModelFacts, RunnerReport, TaskAnswer
from mlx_runner.supervisor import config
from mlx_runner.supervisor.control import Control, readiness
from mlx_runner.supervisor.metrics import Metrics
from mlx_runner.supervisor.runner import Runner
from mlx_runner.supervisor.supervisor import Supervisor
from tests.apiserver.kubelet import NODE_NAMES, Container, Kubelet
from tests.scale.engines import LAYERS, Group, InstantEngines

_HOSTS = 250
_SETUPS = 32
"""Containers that are set up at the same time, as on so many nodes."""
_RESTART_SECONDS = 0.3
_SIGKILL = 137
_RARELY = 10_000
"""Collections of garbage until a full one, which stops thousands of supervisors at once and for a second or more: what
they then leave unsaid would look like so many runners that cannot be reached."""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Uncounted(Metrics):
    """2000 registries in one process would be most of its memory."""

    def __init__(self) -> None:
        pass

    def told(self, answer: TaskAnswer) -> None:
        """Not counted."""


class InstantSupervisor(Supervisor):
    """The image's supervisor with engines, downloads and a watch that take no time."""

    def __init__(self, settings: config.Config, group: Group) -> None:
        super().__init__(settings)
        self.instant = InstantEngines(group)
        self.engines = self.instant
        self.ended = asyncio.Event()
        """Its process is gone."""

    def _start_watch(self) -> None:
        pass

    async def _download(self, runner: Runner, task: DownloadModel) -> None:
        runner.model_path = self.config.model_dir / "tiny"
        model = ModelFacts(digest="sha256:0123456789abcdef", bytes=1000, architecture="qwen2", layers=LAYERS)
        found: dict[str, Any] = {"model": model, "model_available": True, "download_percent": 100}
        self.machine.complete(runner.epoch, TaskName.DOWNLOAD_MODEL, **found)

    def die(self) -> None:
        """SIGKILL to the container: no word to anybody, and its engine's peers read EOF."""
        for task in tuple(self._tasks):
            task.cancel()
        engine = self.instant.used
        if engine is not None:
            engine.on_event = lambda event: None
            engine.on_exit = lambda exit_: None
            engine.kill()
        self.ended.set()


async def _closed(listener: asyncio.Server) -> None:
    """Close it; asyncio would leak a connection that came in the turn before, which has no transport yet."""
    loop = asyncio.get_running_loop()
    for listening in listener.sockets:
        loop.remove_reader(listening.fileno())
    await asyncio.sleep(0)
    listener.close()


class InstantKubelet(Kubelet):
    """Runs all pods of the namespace in this process."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.supervisors: dict[str, InstantSupervisor] = {}
        """By the pod's uid."""
        self._groups: defaultdict[str, Group] = defaultdict(Group)
        self._controls: dict[str, Control] = {}
        self._first = f"127.{random.randint(2, 250)}"  # noqa: S311 (no secret)
        self._setups = asyncio.Semaphore(_SETUPS)
        self._collections = gc.get_threshold()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._route)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)

    async def __aenter__(self) -> "InstantKubelet":
        gc.set_threshold(*self._collections[:2], _RARELY)
        await self._runner.setup()
        await super().__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        server = self._runner.server
        await self._runner.cleanup()  # all connections at once, not those of each pod
        await super().__aexit__(*error)
        if server is not None:
            await server.shutdown(0.0)  # those that came before the last pod stopped to listen
        gc.set_threshold(*self._collections)

    # -- faults
    def kill_engine(self, name: str, number: int = signal.SIGKILL) -> int:
        """SIGKILL the engine of a pod."""
        assert number == signal.SIGKILL, "here it is no process"
        engine = self.supervisors[self.of(name).uid].instant.used
        assert engine is not None
        engine.kill()
        return engine.pid

    def kill(self, name: str, *, engine: bool = True, reason: str = "") -> None:
        """SIGKILL a pod's whole container."""
        assert engine, "here they are one process"
        self.of(name).reason = reason
        self.supervisors[self.of(name).uid].die()

    # -- one pod
    async def _place(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        rank = int(metadata["labels"][names.RANK_LABEL])
        node = NODE_NAMES[rank % len(NODE_NAMES)]
        self._next += 1
        ip = f"{self._first}.{self._next // _HOSTS + 1}.{self._next % _HOSTS + 1}"
        container = Container(metadata["uid"], metadata["namespace"], metadata["name"], ip, node, pod)
        self.containers[container.uid] = container
        container.tasks.append(asyncio.create_task(self._live(container), name="live"))

    async def _live(self, container: Container) -> None:
        async with self._setups:
            await self._bind(container)
            settings = config.from_environment(await self._environment(container))
        while True:
            supervisor = InstantSupervisor(settings, self._groups[settings.uid])
            self.supervisors[container.uid] = supervisor
            listener = await self._listen(container.ip, Control(supervisor, _Uncounted()))
            container.started = _now()
            supervisor.start()
            probing = asyncio.create_task(self._probe_changes(container, supervisor))
            try:
                await supervisor.ended.wait()
            finally:
                probing.cancel()
                await _closed(listener)
                self._cut(container.ip)
            container.ready = False
            ended = {"startedAt": container.started, "finishedAt": _now(), "exitCode": _SIGKILL, "reason": "Error"}
            container.ended = {"terminated": ended}
            await self._report(container, container.ended)
            await asyncio.sleep(_RESTART_SECONDS)
            container.restarts += 1

    async def _bind(self, container: Container) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": container.node}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": container.name}, "target": target}
        while True:
            try:
                resource = Resource("", "v1", f"pods/{container.name}/binding", "Binding")
                await self._kube.create(resource, container.namespace, body)
            except KubeError as error:
                if not error.transient:
                    return  # bound already, or gone
                await asyncio.sleep(0.1)
            else:
                return

    async def _probe_changes(self, container: Container, supervisor: InstantSupervisor) -> None:
        """Report the container whenever its readiness probe would answer differently."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def reported(_: RunnerReport) -> None:
            loop.call_soon(changed.set)  # in the next turn: what follows from the report has then happened

        supervisor.machine.subscribe(reported)
        await self._report(container, {"running": {"startedAt": container.started}})
        while True:
            await changed.wait()
            changed.clear()
            ready = readiness(supervisor) is None
            if ready != container.ready:
                container.ready = ready
                await self._report(container, {"running": {"startedAt": container.started}})

    async def _end(self, container: Container, *, kill: bool) -> None:
        self.containers.pop(container.uid, None)
        supervisor = self.supervisors.pop(container.uid, None)
        if supervisor is not None:
            if not kill:
                await supervisor.drain()
            supervisor.die()
        others = [task for task in container.tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # -- the control port of all pods
    async def _listen(self, ip: str, control: Control) -> asyncio.Server:
        self._controls[ip] = control
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        return await loop.create_server(server, ip, names.CONTROL_PORT, family=socket.AF_INET, reuse_address=True)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        control = self._controls.get(transport.get_extra_info("sockname")[0]) if transport is not None else None
        if control is None:
            raise web.HTTPServiceUnavailable
        handlers: dict[tuple[str, str], _Handler] = {
            ("POST", "/tasks"): control.tasks,
            ("GET", "/report"): control.report,
            ("GET", "/reports"): control.reports,
            ("GET", "/readyz"): control.readyz,
        }
        handler = handlers.get((request.method, request.path))
        if handler is None:
            raise web.HTTPNotFound
        return await handler(request)

    def _cut(self, ip: str) -> None:
        """The process that held these connections is gone."""
        self._controls.pop(ip, None)
        server = self._runner.server
        for connection in server.connections if server is not None else ():
            transport = connection.transport
            if transport is not None and transport.get_extra_info("sockname")[0] == ip:
                transport.abort()


def _now() -> str:
    return format_time(datetime.now(UTC))
