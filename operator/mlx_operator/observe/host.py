"""kopf as the process host: its watches feed the store, and that is all it does here.

Only `on.event` handlers are used, and no storage, finalizer, patch or posting of kopf's: its high-level handlers are
not level-triggered, and its indices lose deletions when a watch starts over.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any

import aiohttp
import kopf
from kopf._cogs.structs.references import Insights  # a public argument of a class that has no public name

from mlx_operator.act.kube import PAGE
from mlx_operator.act.resources import INSTANCES, NODES, PODS, SERVICES, Resource
from mlx_operator.errors import HostError
from mlx_operator.observe.sweep import Scope
from mlx_operator_api import names

log = logging.getLogger(__name__)

Event = Callable[[Resource, str | None, dict[str, Any]], None]
Login = Callable[[], Awaitable[kopf.ConnectionInfo]]
_BACKOFF_FIRST = 0.2
_BACKOFF_CAP = 5.0


class _NoDiff(kopf.DiffBaseStorage):
    """Legal because no state-changing handler is registered; saves deep copies of every object."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> None:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    def fetch(self, *, key: str, body: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


class _Forever:
    """Back-off of the watches: endless, so that an outage of the API server is no reason to exit."""

    def __iter__(self) -> Iterator[float]:
        delay = _BACKOFF_FIRST
        while True:
            yield delay * random.uniform(0.8, 1.2)  # noqa: S311 (jitter is no secret)
            delay = min(delay * 2, _BACKOFF_CAP)


def settings() -> kopf.OperatorSettings:
    """Where we differ from the defaults."""
    chosen = kopf.OperatorSettings()
    chosen.peering.standalone = True  # a Lease of our own: kopf's peering is not fenced
    chosen.scanning.disabled = True  # needs permissions on CRDs and namespaces; the start barrier checks them once
    chosen.posting.enabled = False  # its Events are neither folded nor do they say an action
    chosen.persistence.diffbase_storage = _NoDiff()
    chosen.persistence.progress_storage = _NoProgress()
    chosen.watching.server_timeout = 300  # a watch that silently died is opened anew, without a list
    chosen.watching.client_timeout = 310
    chosen.watching.connect_timeout = 10
    # Without pages the JSON of a whole list is the peak of our memory. One that expires between two pages (a new API
    # server and a compaction in that very moment) ends the process, which starts again.
    chosen.watching.chunk_size = PAGE
    chosen.watching.label_selectors[PODS.plural] = names.INSTANCE_LABEL
    chosen.watching.label_selectors[SERVICES.plural] = names.INSTANCE_LABEL
    chosen.networking.request_timeout = 30
    chosen.networking.connect_timeout = 5
    chosen.networking.error_backoffs = _Forever()
    chosen.queueing.idle_timeout = 0.1  # a task per object that changed within this time, which holds it as it came
    chosen.process.ultimate_exiting_timeout = 25
    # initial_streaming stays off: after a cut in the middle of the first stream it goes on with what it has, for good.
    return chosen


def registry(scope: Scope, event: Event, login: Login, cleanup: Callable[[], Awaitable[None]]) -> kopf.OperatorRegistry:
    """The handlers: one per watched kind, the login, and `cleanup` when kopf has stopped watching."""
    handlers = kopf.OperatorRegistry()
    for resource in _kinds(scope):
        _feed(handlers, resource, event)

    @kopf.on.login(registry=handlers)
    async def _login(**_: Any) -> kopf.ConnectionInfo:
        return await login()

    @kopf.on.cleanup(registry=handlers)
    async def _cleanup(**_: Any) -> None:
        await cleanup()

    return handlers


def _kinds(scope: Scope) -> list[Resource]:
    return [INSTANCES, PODS, SERVICES, *([NODES] if scope.watches_nodes else [])]


def _feed(handlers: kopf.OperatorRegistry, resource: Resource, feed: Event) -> None:
    feed = apart(feed)

    # The core group is named explicitly: without it kopf discovers every group of the API.
    @kopf.on.event(resource.group, resource.version, resource.plural, registry=handlers, id=f"feed-{resource.plural}")
    async def _on_event(event: Any, **_: Any) -> None:
        feed(resource, event["type"], event["object"])


def apart(feed: Event) -> Event:
    """The same, without the context variables of its caller.

    kopf's hold the object as it came and its copies. Every task and timer that begins here would inherit them, and the
    report stream of a pod lives as long as the pod: of all memory a third was that.
    """

    def fed(resource: Resource, kind: str | None, item: dict[str, Any]) -> None:
        Context().run(feed, resource, kind, item)

    return fed


async def watch(handlers: kopf.OperatorRegistry, scope: Scope, ready: Any) -> None:
    """Watch until SIGTERM or SIGINT; `ready` is set once the watches begin.

    Raises:
        HostError: an answer broke off where kopf does not ask again, such as its discovery at the start, or the
            discovery did not find every kind.
    """
    insights = Insights()
    host = kopf.operator(
        registry=handlers,
        settings=settings(),
        standalone=True,
        clusterwide=not scope.namespaces,
        namespaces=scope.namespaces,
        ready_flag=ready,
        insights=insights,
        # Peering is off; kopf would ask for the name of the user, and the pod's uid has none.
        identity=names.FIELD_MANAGER,
    )
    try:
        await _complete(host, _undiscovered(insights, _kinds(scope)))
    except (aiohttp.ClientError, TimeoutError) as error:
        asyncio.get_running_loop().set_exception_handler(_log_aftermath)
        raise HostError(f"{type(error).__name__}: {error}") from error


async def _complete(host: Coroutine[Any, Any, None], undiscovered: Coroutine[Any, Any, list[str]]) -> None:
    """Run the host to its end, unless there is a kind that it does not see."""
    # Side by side from the start: what begins later the host takes for its own.
    watching, looking = asyncio.create_task(host, name="host"), asyncio.create_task(undiscovered, name="discovery")
    try:
        await asyncio.wait([watching, looking], return_when=asyncio.FIRST_COMPLETED)
        if looking.done() and (missing := looking.result()):
            # kopf would not look again. An API server that has just started does not name all groups yet.
            raise HostError(f"the discovery of the API server did not name {', '.join(missing)}")
        await watching
    finally:
        watching.cancel()
        looking.cancel()
        await asyncio.gather(watching, looking, return_exceptions=True)


async def _undiscovered(insights: Insights, kinds: list[Resource]) -> list[str]:
    await insights.ready_resources.wait()
    found = {(resource.group, resource.version, resource.plural) for resource in insights.watched_resources}
    return [kind.plural for kind in kinds if (kind.group, kind.version, kind.plural) not in found]


def _log_aftermath(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Requests beside the one that broke off, which nobody awaits any more, must not have the last word in the log."""
    log.debug("after the watches ended: %s", context["message"], exc_info=context.get("exception"))
