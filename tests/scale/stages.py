"""What is done to many instances, and what is counted meanwhile: from nothing to Ready, idle, restart, mass death."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.conditions import Reason
from tests.apiserver.harness import Manifest, World, eventually, is_ready
from tests.cluster.audit import Request
from tests.scale.place import Watched, watched

RUNNERS = 2
_CREATES = 16
_POLL_SECONDS = 1.0
_READY = "mlx_operator_instances{ready=True,reason=Ready}"


class Stage(StrEnum):
    """What is done, in this order."""

    READY = "from nothing to Ready"
    IDLE = "idle"
    RESTART = "the operator restarts"
    DEATHS = "many runners die at once"


@dataclass(frozen=True)
class Size:
    """How much, and how long anything may take."""

    instances: int
    killed: int
    idle_seconds: float
    deadline: float
    quiet_seconds: float = 6.0
    """Longer than the operator lets a small change wait for the next write."""


@dataclass
class Counts:
    """Writes of the operator, by instance."""

    status: Counter[str] = field(default_factory=Counter)
    children: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    other: list[Request] = field(default_factory=list)

    def each(self, name: str) -> int:
        """Status and children of one instance."""
        return self.status[name] + self.children[name]


@dataclass
class Figures:
    """Everything that was seen."""

    size: Size
    ready_seconds: float = 0.0
    writes: Counts = field(default_factory=Counts)
    idle_writes: list[Request] = field(default_factory=list)
    idle_cpu: float = 0.0
    """Of one core, while idle."""
    cpu_to_ready: float = 0.0
    """Seconds of the operator's CPU."""
    empty_memory: float = 0.0
    memory: tuple[float, float] = (0.0, 0.0)
    """MiB with all streams open: now, highest."""
    streams: float = 0.0
    restart_seconds: float = 0.0
    restart_cpu: float = 0.0
    restart_writes: list[Request] = field(default_factory=list)
    restarted_memory: tuple[float, float] = (0.0, 0.0)
    wrong_causes: dict[str, str] = field(default_factory=dict)
    unaffected_touched: list[str] = field(default_factory=list)
    healed_seconds: float = 0.0
    heal_writes: Counts = field(default_factory=Counts)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def kib_each(self) -> tuple[float, float]:
        """Memory beyond that of an operator without instances, by instance: all came while it ran; after a restart."""
        grown = (self.memory[0] - self.empty_memory, self.restarted_memory[0] - self.empty_memory)
        came, found = (1024 * mib / self.size.instances for mib in grown)
        return came, found


Done = Callable[[Stage, Figures], None]


async def everything(place: World, size: Size, done: Done, seed: int) -> Figures:
    """All stages, one after the other; `done` hears of each."""
    figures = Figures(size)
    operator = await watched(place)
    figures.empty_memory = operator.memory()[0]
    await _to_ready(place, operator, size, figures)
    done(Stage.READY, figures)
    await _idle(place, operator, size, figures)
    done(Stage.IDLE, figures)
    operator = await _restart(place, operator, size, figures)
    done(Stage.RESTART, figures)
    await _kill(place, operator, size, figures, random.Random(seed))  # noqa: S311 (no secret)
    done(Stage.DEATHS, figures)
    return figures


async def _to_ready(place: World, operator: Watched, size: Size, figures: Figures) -> None:
    mark, began, used = place.audit.mark(), time.monotonic(), operator.cpu()
    gate = asyncio.Semaphore(_CREATES)

    async def create(name: str) -> None:
        async with gate:
            await place.create(name)

    await asyncio.gather(*(create(name_of(number)) for number in range(size.instances)))
    await _all_ready(operator, size)
    figures.ready_seconds, figures.cpu_to_ready = time.monotonic() - began, operator.cpu() - used
    await place.settled(size.quiet_seconds)
    figures.writes = counted(place.writes(mark))


async def _all_ready(operator: Watched, size: Size) -> None:
    seen: dict[str, float] = {}

    async def look() -> bool:
        await asyncio.sleep(_POLL_SECONDS)
        seen.clear()
        seen.update(await operator.metrics())
        return seen.get(_READY) == size.instances

    try:
        await eventually(look, "all instances are Ready", size.deadline)
    except AssertionError as error:
        states = {name: value for name, value in seen.items() if name.startswith("mlx_operator_instances")}
        raise AssertionError(f"{error}\n{states}\n{operator.process.lines()[-3000:]}") from None


async def _idle(place: World, operator: Watched, size: Size, figures: Figures) -> None:
    mark, began, used = place.audit.mark(), time.monotonic(), operator.cpu()
    await asyncio.sleep(size.idle_seconds)  # the window is the measurement
    figures.idle_writes = place.writes(mark)
    figures.idle_cpu = (operator.cpu() - used) / (time.monotonic() - began)
    figures.memory = operator.memory()
    figures.streams = (await operator.metrics()).get("mlx_operator_report_streams", 0.0)


async def _restart(place: World, operator: Watched, size: Size, figures: Figures) -> Watched:
    mark = place.audit.mark()
    await operator.process.stop()
    began = time.monotonic()
    fresh = await watched(place)

    async def converged() -> bool:
        return await fresh.settled_with(size.instances * RUNNERS)

    await eventually(converged, "the new operator hears every runner", size.deadline)
    figures.restart_seconds, figures.restart_cpu = time.monotonic() - began, fresh.cpu()
    await place.settled(size.quiet_seconds)
    figures.restart_writes = place.writes(mark)
    figures.restarted_memory = fresh.memory()
    return fresh


async def _kill(place: World, operator: Watched, size: Size, figures: Figures, chance: random.Random) -> None:
    """Engines and whole containers, turn by turn, wherever chance strikes."""
    runners = [(number, rank) for number in range(size.instances) for rank in range(RUNNERS)]
    struck = chance.sample(runners, size.killed)
    expected: dict[str, dict[int, Reason]] = {}
    mark, began = place.audit.mark(), time.monotonic()
    for turn, (number, rank) in enumerate(struck):
        whole = turn % 2 == 1
        (place.kubelet.kill if whole else place.kubelet.kill_engine)(f"{name_of(number)}-{rank}")
        reason = Reason.CONTAINER_CRASHED if whole else Reason.ENGINE_CRASHED
        expected.setdefault(name_of(number), {})[rank] = reason
    items: dict[str, Manifest] = {}

    async def healed() -> bool:
        await asyncio.sleep(_POLL_SECONDS)
        items.update(await instances(place))
        if len(items) < size.instances:
            return False
        return all(is_ready(items[name]) and items[name]["status"]["epoch"] > 1 for name in expected)

    await eventually(healed, "all groups are Ready again", size.deadline)
    figures.healed_seconds = time.monotonic() - began
    await place.settled(size.quiet_seconds)
    figures.heal_writes, figures.metrics = counted(place.writes(mark)), await operator.metrics()
    for name, item in (await instances(place)).items():
        history = item["status"].get("history", [])
        if name not in expected and history:
            figures.unaffected_touched.append(name)
        elif name in expected and (wrong := _wrong(history, expected[name])):
            figures.wrong_causes[name] = wrong


def _wrong(history: list[dict[str, Any]], expected: dict[int, Reason]) -> str:
    """What is not right about the recorded failures; empty where all is."""
    if len(history) != 1:
        return f"{len(history)} failures for one death: {history}"
    cause = history[0]
    if expected.get(cause.get("rank", -1)) != cause["reason"]:
        return f"{cause['reason']} of rank {cause.get('rank')}: {cause['message']}; killed: {expected}"
    others = set(range(RUNNERS)) - set(expected)
    return "" if others <= set(cause.get("consequences", ())) else f"no consequence of {others}: {cause}"


async def instances(place: World) -> dict[str, Manifest]:
    """All of them; none while the API server does not answer."""
    try:
        return {item["metadata"]["name"]: item for item in (await place.kube.list(INSTANCES, place.namespace))[0]}
    except KubeError as error:
        if not error.transient:
            raise
        return {}


def counted(writes: list[Request]) -> Counts:
    """Writes that reached the API server, by instance and kind."""
    counts = Counts()
    for write in writes:
        body = write.body or {}
        name = write.name or body.get("metadata", {}).get("name", "")
        if write.resource.startswith("modelinstances"):
            counts.status[name] += 1
        elif write.resource == "events":
            counts.events[(body.get("regarding") or {}).get("name") or name.split(".")[0]] += 1
        elif write.resource in ("pods", "services", "secrets"):
            counts.children[instance_of(write)] += 1
        else:
            counts.other.append(write)
    return counts


def instance_of(write: Request) -> str:
    """The instance that a child belongs to: its name is the first two words of the child's."""
    return "-".join(write.name.split("-")[:2]) if write.name else ""


def name_of(number: int) -> str:
    """Name of an instance."""
    return f"mi-{number:04d}"
