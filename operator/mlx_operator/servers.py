"""Small HTTP servers of the operator: probes and metrics."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from mlx_operator.options import Address

_STOP_SECONDS = 0.2


async def serve(address: Address, routes: list[web.RouteDef]) -> web.AppRunner:
    """Listen; `cleanup` of the result stops it.

    Raises:
        OSError: the address cannot be bound.
    """
    application = web.Application()
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=_STOP_SECONDS)
    await runner.setup()
    await web.TCPSite(runner, address.host, address.port).start()
    return runner


def probe(path: str, check: Callable[[], str | None]) -> web.RouteDef:
    """200 `ok` while `check` returns None, else 503 with what it says."""

    async def answer(_: web.Request) -> web.Response:
        trouble = check()
        return web.Response(text="ok\n") if trouble is None else web.Response(text=f"{trouble}\n", status=503)

    return web.get(path, answer)


def metrics(registry: CollectorRegistry) -> web.RouteDef:
    """The registry in Prometheus's text format."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return web.get("/metrics", answer)
