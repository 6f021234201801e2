"""The parts of a leading operator, put together: store, queue, workers, streams, sweeps."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlx_operator.act.actor import Actor
from mlx_operator.act.kube import Kube
from mlx_operator.act.recorder import Recorder
from mlx_operator.act.resources import INSTANCES, PODS
from mlx_operator.act.runner import RunnerPort
from mlx_operator.act.status_writer import StatusWriter
from mlx_operator.act.tasks import TaskSender
from mlx_operator.act.tokens import OperatorKey
from mlx_operator.decide.observed import Settings
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe.observer import Observer
from mlx_operator.observe.podevents import PodEvents
from mlx_operator.observe.podreads import PodReads
from mlx_operator.observe.reports import ReportStreams
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator.observe.sweep import Lister, Scope, Sweeper
from mlx_operator.reconciler import Planner, Reconciler
from mlx_operator.workqueue import WorkQueue


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a controller is told once."""

    settings: Settings
    scope: Scope
    key: OperatorKey
    reporter: str
    """`reportingInstance` of events: the pod's name."""
    workers: int
    sweep_seconds: tuple[float, float]


def wall_clock() -> datetime:
    """Now, aware."""
    return datetime.now(UTC)


class Controller:
    """Lives as long as one leadership: `start`, then `stop`."""

    def __init__(self, kube: Kube, planner: Planner, configuration: Configuration, metrics: Metrics) -> None:
        self._configuration = configuration
        self._metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []
        token_of = configuration.key.token
        self.store = Store(configuration.settings)
        self.queue: WorkQueue[Key] = WorkQueue()
        self.observer = Observer(self.store, self.queue, metrics)
        self._port = RunnerPort()
        self._recorder = Recorder(kube, reporter=configuration.reporter, metrics=metrics)
        self._lister = Lister(kube, self.store, configuration.scope, metrics)
        self._pod_reads = PodReads(kube, self.store, changed=self.observer.changed)
        self._streams = ReportStreams(
            self.store,
            self._port,
            token_of=token_of,
            changed=self.observer.changed,
            now=wall_clock,
            metrics=metrics,
            lost=self._pod_reads.want,
        )
        self._pod_events = PodEvents(kube, self.store, changed=self.observer.changed, now=wall_clock, metrics=metrics)
        self._sender = TaskSender(
            self.store,
            self._port,
            token_of=token_of,
            changed=self.observer.changed,
            later=self.queue.add_after,
            now=wall_clock,
            metrics=metrics,
        )
        actor = Actor(
            kube,
            self.store,
            self._sender,
            token_of=token_of,
            answered=self.observer.answered,
            missing=self._pod_reads.want,
            later=self.queue.add_after,
            now=wall_clock,
        )
        self._reconciler = Reconciler(
            store=self.store,
            queue=self.queue,
            planner=planner,
            writer=StatusWriter(kube),
            actor=actor,
            recorder=self._recorder,
            answered=self.observer.answered,
            now=wall_clock,
            metrics=metrics,
        )

    async def start(self) -> None:
        """Load the whole picture, then begin to plan.

        Raises:
            StartError: the picture cannot be had.
        """
        await self._lister.seed()
        decision("seeded", instances=self.store.count(INSTANCES), pods=self.store.count(PODS))
        sweeper = Sweeper(self._lister, self.observer.changed, self._metrics, self._configuration.sweep_seconds)
        self.observer.relisted = sweeper.relisted
        self.store.pod_changed = self._pod_changed
        for pod in self.store.pods():
            self._pod_changed(pod["metadata"]["uid"])
        self._metrics.queue(lambda: len(self.queue), lambda: self.queue.age)
        self._metrics.instances(self.store.instances)
        for instance in self.store.instances():
            self.queue.add(Key(instance["metadata"]["namespace"], instance["metadata"]["name"]))
        self._spawn("sweeper", sweeper.run())
        self._spawn("pod events", self._pod_events.run())
        self._spawn("pod reads", self._pod_reads.run())
        self._spawn("event recorder", self._recorder.run())
        for number in range(self._configuration.workers):
            self._spawn(f"worker {number}", self._reconciler.run_worker())

    def trouble(self) -> str | None:
        """Which part ended although nobody stopped it; only a restart helps then."""
        ended = [task.get_name() for task in self._tasks if task.done()]
        return f"{', '.join(ended)} ended" if ended else None

    async def stop(self) -> None:
        """End everything that `start` began; what was begun and not done is found again by the next start."""
        await self._recorder.flush()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.queue.close()
        await self._streams.close()
        await self._sender.close()
        await self._port.close()

    def _pod_changed(self, uid: str) -> None:
        self._streams.pod_changed(uid)
        self._pod_events.pod_changed(uid)
        if self.store.pod(uid) is None:
            self._sender.forget(uid)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A part that nobody stopped has ended: the process is restarted for it, and the log is what is left."""
        if task.cancelled():
            return
        self._metrics.bugs.inc()
        decision("part ended", level=logging.ERROR, part=task.get_name(), error=task.exception(), traceback=True)
