"""The operator's process: options, probes, leadership, and kopf as the host of the watches."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import kopf
from kubernetes.aio.config import ConfigException

from mlx_operator.act.kube import Kube, KubeError, configuration
from mlx_operator.act.tokens import OperatorKey, UnusableKeyError, operator_key
from mlx_operator.controller import Configuration, Controller, wall_clock
from mlx_operator.decide.observed import Settings
from mlx_operator.errors import Refusals, StartError
from mlx_operator.lease import Lease, Timing, first_transitions, lead
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe import host
from mlx_operator.observe.sweep import Scope
from mlx_operator.options import Options
from mlx_operator.reconciler import Planner
from mlx_operator.servers import metrics as metrics_route
from mlx_operator.servers import probe, serve

_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_RETRY_SECONDS = 1.0


class Process:
    """One run of the operator, deciding with `planner`."""

    def __init__(self, options: Options, planner: Planner) -> None:
        self._options = options
        self._planner = planner
        self._metrics = Metrics()
        self._lease: Lease | None = None
        self._controller: Controller | None = None
        self._watching = asyncio.Event()
        self._servers = AsyncExitStack()
        self._leading = False
        self._stopping = False

    async def run(self) -> int:
        """Run until SIGTERM or SIGINT; returns the exit code."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)  # kopf puts its own in their place while it runs
        try:
            settings = await configuration(self._options.kubeconfig)
        except (ConfigException, OSError) as error:
            raise StartError(f"no way to the API server: {error}; name a kubeconfig file with --kubeconfig") from error
        kube = Kube(settings, self._metrics.request)
        try:
            await self._serve()
            await _first(self._lead(kube, settings), stop.wait())
        finally:
            await self._servers.aclose()
            await kube.close()
        return 0

    async def _serve(self) -> None:
        options = self._options
        probes = [probe("/healthz", self._unhealthy), probe("/readyz", self._unready)]
        wanted = [(options.probes_bind, probes), (options.metrics_bind, [metrics_route(self._metrics.registry)])]
        for address, routes in wanted:
            if address is None:
                continue
            try:
                server = await serve(address, routes)
            except OSError as error:
                raise StartError(f"cannot listen on {address.host}:{address.port}: {error.strerror}") from error
            self._servers.push_async_callback(server.cleanup)

    def _unhealthy(self) -> str | None:
        return self._controller.trouble() if self._controller is not None else None

    def _unready(self) -> str | None:
        if self._stopping:
            return "stopping"
        if self._watching.is_set():
            return None
        if self._lease is not None and self._lease.readable and not self._leading:
            return None  # a standby that could take over
        return "starting"

    async def _lead(self, kube: Kube, settings: Any) -> None:
        options = self._options
        if not options.leader_elect:
            await self._work(kube, settings, first_transitions(wall_clock()))
            return
        lease = self._lease = Lease(
            kube,
            options.namespace,
            options.lease_name,
            options.identity,
            now=wall_clock,
            timing=Timing(),
            pod=options.pod,
        )
        await lead(lease, lambda transitions: self._work(kube, settings, transitions), _abandon)

    async def _work(self, kube: Kube, settings: Any, transitions: int) -> None:
        options = self._options
        self._leading = True
        self._metrics.leader.set(1)
        key = await _key(kube, options)
        chosen = Settings(
            runner_image=options.runner_image,
            key_id=key.key_id,
            image_pull_policy=options.runner_image_pull_policy,
            lease_transitions=transitions,
            started=wall_clock(),
            watch_nodes=not options.watch_namespaces,
        )
        scope = Scope(options.watch_namespaces)
        controller = self._controller = Controller(
            kube,
            self._planner,
            Configuration(chosen, scope, key, options.identity, options.workers, options.sweep_seconds),
            self._metrics,
        )
        try:
            await controller.start()
            handlers = host.registry(scope, controller.observer.event, _login(settings, options), self._cleanup)
            await host.watch(handlers, scope, self._watching)
        finally:
            await self._cleanup()

    async def _cleanup(self) -> None:
        """End what runs beside kopf. It takes every younger task for its own, and would wait 5 s for each to end."""
        if self._stopping:
            return
        self._stopping = True
        if self._controller is not None:
            await self._controller.stop()
        await self._servers.aclose()


async def _key(kube: Kube, options: Options) -> OperatorKey:
    refusals = Refusals()
    while True:
        try:
            return await operator_key(kube, options.namespace, options.key_secret)
        except KubeError as error:
            if not error.transient and refusals.final():
                raise StartError(f"Secret {options.namespace}/{options.key_secret}: {error}") from error
            decision("waiting for the API server", level=logging.WARNING, error=error)
            await asyncio.sleep(_RETRY_SECONDS)
        except UnusableKeyError as error:
            raise StartError(str(error)) from error


async def _first(*works: Any) -> None:
    """Run all until the first ends; cancel and await the rest; raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _abandon(why: str) -> None:
    """Another operator may lead by now: end at once, before anything else is sent."""
    decision("leadership lost, exiting", level=logging.ERROR, why=why)
    logging.shutdown()
    os._exit(1)


def _login(settings: Any, options: Options) -> Callable[[], Any]:
    """Kopf's credentials, from the same configuration as ours."""

    async def login() -> kopf.ConnectionInfo:
        token = await _bearer(settings, options)
        return kopf.ConnectionInfo(
            server=settings.host,
            ca_path=settings.ssl_ca_cert,
            ca_data=settings.ca_cert_data if not settings.ssl_ca_cert else None,
            insecure=not settings.verify_ssl,
            certificate_path=settings.cert_file,
            private_key_path=settings.key_file,
            scheme="Bearer" if token else None,
            token=token,
        )

    return login


async def _bearer(settings: Any, options: Options) -> str | None:
    if options.kubeconfig is None:
        # Read anew: kopf asks when the old token was refused, and the client keeps its copy for a minute.
        return (await asyncio.to_thread(_TOKEN.read_text)).strip()
    value: str | None = await settings.get_api_key_with_prefix("BearerToken")
    return value.split(" ", 1)[-1].strip() if value else None
