"""The supervisor: carries out what the machine accepted, watches the engine, and ends in good order."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from mlx_operator_api.conditions import Reason, Retry
from mlx_operator_api.runner import ENDED, SERVING, RunnerState, TaskName
from mlx_operator_api.tasks import (
    PROTOCOL,
    ConnectToGroup,
    CreateRunner,
    DownloadModel,
    LoadModel,
    RunnerReport,
    Shutdown,
    StartWarmup,
    TaskAnswer,
    TaskPhase,
    TaskRequest,
)
from mlx_runner.download import result
from mlx_runner.download.request import Request
from mlx_runner.progress import Phase, Snapshot

from .blame import explained
from .cgroup import Cgroup
from .config import Config
from .downloading import download
from .engines import Engines
from .machine import Machine
from .requests import Broker
from .runner import Runner
from .state_file import StateFile
from .tuning import Tuning
from .watch import POLL_SECONDS, Sample, Watch, read_process

log = logging.getLogger(__name__)

_EXIT_MARGIN_SECONDS = 5.0
"""Before the end of the grace period, where the kubelet sends SIGKILL."""
_GOODBYE_SECONDS = 2.0
_WORKER_QUIET_SECONDS = 5.0
"""A worker whose engine has been idle for this long after SIGTERM serves nobody."""


class BadTaskError(ValueError):
    """A task that is not for this runner, or that contradicts itself: 400."""


class StaleLeaderError(Exception):
    """The task comes from a leader that was replaced: 409."""


class Supervisor:
    """One per pod."""

    def __init__(self, config: Config, cgroup: Cgroup | None = None) -> None:
        self.config = config
        self.cgroup = cgroup or Cgroup()
        self.state_file = StateFile(config.state_dir)
        self.machine = Machine(
            config.uid,
            config.rank,
            predecessor=self.state_file.predecessor(config.uid, config.rank),
            memory_limit_bytes=self.cgroup.memory_limit(),
        )
        self.broker = Broker(self.machine.requests)
        self.engines = Engines(config, self.cgroup)
        self.runner: Runner | None = None
        self._tuning = Tuning()
        self._lease_transitions = 0
        self._creating = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the first engine and the watch."""
        if (predecessor := self.machine.report.predecessor) is not None:
            log.warning("predecessor: state=%s epoch=%d died", predecessor.state, predecessor.epoch)
        self.machine.subscribe(self.state_file.write)
        self.state_file.write(self.machine.report)
        self.engines.prepare()
        self._start_watch()

    @property
    def served_name(self) -> str | None:
        """What clients put in `model`; None before the first CreateRunner."""
        return self.runner.facts.served_name if self.runner else None

    def heartbeat(self) -> RunnerReport:
        """The report now, with a higher seq and the engine's step counter."""
        engine = self.runner.engine if self.runner else None
        return self.machine.heartbeat(engine.progress.steps if engine else 0)

    @property
    def held(self) -> Snapshot | None:
        """What the living engine of this epoch last wrote about itself."""
        engine = self.runner.engine if self.runner else None
        return engine.progress if engine is not None and engine.alive else None

    # -- tasks
    def handle(self, request: TaskRequest) -> TaskAnswer:
        """Decide on a task and start it; never waits.

        Raises:
            BadTaskError: it is not for this runner, or contradicts itself.
            StaleLeaderError: its sender is no longer the leader.
        """
        self._check(request)
        self._lease_transitions = request.lease_transitions
        offer = self.machine.offer(request)
        if offer.run:
            self._run(request)
        if isinstance(request.task, Shutdown) and request.task.final and offer.outcome.phase is not TaskPhase.REJECTED:
            self.broker.give_up("see the instance's status")
        return TaskAnswer(outcome=offer.outcome, report=self.machine.report)

    def _check(self, request: TaskRequest) -> None:
        # Version 1 is the first. An operator may be one release ahead of its runners, or behind.
        spoken = range(max(1, PROTOCOL - 1), PROTOCOL + 1)
        if request.protocol not in spoken:
            speaks = " and ".join(str(version) for version in spoken)
            raise BadTaskError(f"protocol {request.protocol} is not spoken here: this runner speaks {speaks}")
        if request.instance_uid != self.config.uid:
            raise BadTaskError(
                f"instanceUid {request.instance_uid!r} is not this runner's: it is of {self.config.uid!r}"
            )
        if request.rank != self.config.rank:
            raise BadTaskError(f"rank {request.rank} is not this runner's: it is rank {self.config.rank}")
        if request.lease_transitions < self._lease_transitions:
            raise StaleLeaderError(
                f"leaseTransitions {request.lease_transitions} is lower than {self._lease_transitions} seen before: "
                "the sender is no longer the leader"
            )
        task = request.task
        if isinstance(task, CreateRunner) and not self.config.rank < task.world_size:
            raise BadTaskError(f"worldSize {task.world_size} has no rank {self.config.rank}")
        if isinstance(task, ConnectToGroup):
            ranks = sorted(peer.rank for peer in task.peers)
            size = self.machine.report.world_size
            if request.epoch == self.machine.epoch and ranks != list(range(size)):
                raise BadTaskError(f"peers names the ranks {ranks}: every rank from 0 to {size - 1} is needed once")

    def _run(self, request: TaskRequest) -> None:
        task = request.task
        if isinstance(task, CreateRunner):
            self._create(request.epoch, task)
            return
        runner = self.runner
        assert runner is not None  # noqa: S101 (the table accepts nothing else before CreateRunner)
        match task:
            case DownloadModel():
                runner.track(self._spawn(self._download(runner, task)))
            case ConnectToGroup():
                runner.connect(task)
            case LoadModel():
                runner.load(str(runner.model_path))
            case StartWarmup():
                runner.warm_up()
            case Shutdown():
                self._spawn(runner.shut_down(task.grace_seconds))

    def _create(self, epoch: int, facts: CreateRunner) -> None:
        old = self.runner
        self.broker.lose(f"epoch {epoch} of the group starts")
        if old is not None:
            self.broker.explain(own_doing=explained(facts.cause, old.epoch))
        if old is not None:
            old.retire()
        self.runner = Runner(
            epoch,
            facts,
            config=self.config,
            machine=self.machine,
            broker=self.broker,
            tuning=self._tuning,
            on_ready=self.engines.stand_by,
            on_gone=self.engines.prepare,
        )
        self._spawn(self._give_engine(old, self.runner))

    async def _give_engine(self, old: Runner | None, runner: Runner) -> None:
        async with self._creating:
            if old is not None:
                await old.clean_up()
            if runner is not self.runner:
                return  # a newer epoch came while the old engine was dying
            try:
                runner.attach(await self.engines.take())
            except OSError as error:
                runner.fail(Reason.ENGINE_CRASHED, f"the engine cannot be started: {error}")
                return
            self.machine.complete(runner.epoch, TaskName.CREATE_RUNNER)

    async def _download(self, runner: Runner, task: DownloadModel) -> None:
        def tell(**facts: Any) -> None:
            if runner is self.runner:
                self.machine.note(**facts)

        said = await download(
            Request(
                source=runner.facts.source,
                model_dir=self.config.model_dir,
                cache_dir=self.config.cache_dir,
                memory=self.config.state_dir / "hashes.json",
                revision=task.revision,
                adapter=runner.facts.adapter,
                adapter_dir=self.config.adapter_dir,
                adapter_revision=task.adapter_revision,
                rank=self.config.rank,
                world_size=runner.facts.world_size,
                sharding=runner.facts.sharding,
                memory_limits=task.memory_limits,
                cache_bytes=self.config.cache_bytes,
            ),
            seconds=runner.facts.deadlines.download,
            tell=tell,
        )
        if isinstance(said, result.Found):
            runner.model_path, runner.adapter_path = said.path, said.adapter
            self.machine.complete(
                runner.epoch,
                TaskName.DOWNLOAD_MODEL,
                model=said.facts,
                model_available=True,
                download_percent=100,
                download_trouble=None,
            )
        else:
            log.error(f"download failed: reason={said.reason} epoch={runner.epoch}: {said.message}")
            tell(download_trouble=None)
            why = {"reason": said.reason, "message": said.message}
            if (
                self.machine.fail_task(runner.epoch, TaskName.DOWNLOAD_MODEL, **why)
                and said.reason.retry is Retry.NEVER
            ):
                self.broker.give_up(said.message)

    # -- the end
    async def drain(self) -> None:
        """SIGTERM: refuse new requests, let running ones finish within the grace, end the engine. Then exit."""
        grace = max(0.0, self.config.grace_seconds - _EXIT_MARGIN_SECONDS)
        log.info("draining: state=%s active_requests=%d grace=%g s", self.machine.state, self.broker.active, grace)
        self.broker.close("the runner is shutting down")
        self.machine.drain()
        runner = self.runner
        if runner is not None and self.machine.state not in ENDED:
            # A planned Shutdown promised its grace to what runs; at its end it takes those requests from the broker.
            served = self.machine.state in SERVING or self.broker.active > 0
            if served:
                await self._until_quiet(runner, grace)
            self.machine.shut_down(runner.epoch)
            # What is still loading cannot hear a goodbye, and nobody waits for it.
            await runner.shut_down(_GOODBYE_SECONDS if served else 0.0)
        await self.close()

    async def close(self) -> None:
        """End everything that lives."""
        if self._watch is not None:
            self._watch.cancel()
        if self.runner is not None:
            await self.runner.clean_up()
        await self.engines.close()

    async def _until_quiet(self, runner: Runner, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                if self.config.rank == 0:
                    await self.broker.idle.wait()
                else:
                    await self._worker_done(runner)
        except TimeoutError:
            log.warning("still busy at the end of the grace of %g s", grace)

    async def _worker_done(self, runner: Runner) -> None:
        """Rank 0 may still serve: its goodbye ends our engine. Or it lives on, without a request for us."""
        engine = runner.engine
        if engine is None:
            return
        end = asyncio.ensure_future(engine.wait())
        try:
            while self.machine.state in SERVING:
                done, _ = await asyncio.wait([end], timeout=POLL_SECONDS)
                last = engine.progress
                # One that waits has a request in work, however long another rank takes for its part.
                idle = last.phase is Phase.IDLE and time.monotonic() - last.changed > _WORKER_QUIET_SECONDS
                if done or idle:
                    return
        finally:
            end.cancel()

    # -- the watch
    def _start_watch(self) -> None:
        self._watch = asyncio.create_task(self._watch_engine(), name="watch")
        self._watch.add_done_callback(self._watch_ended)

    def _watch_ended(self, task: "asyncio.Task[None]") -> None:
        """Only a bug ends the watch, and none may leave the pod without one. It looks at most once a second."""
        if task.cancelled():
            return
        log.critical("a bug in the watch of the engine, which starts again", exc_info=task.exception())
        self._start_watch()

    async def _watch_engine(self) -> None:
        watched: Runner | None = None
        watch = Watch(0)
        while True:
            await asyncio.sleep(POLL_SECONDS)
            runner = self.runner
            if runner is None or runner.engine is None or self.machine.state in (ENDED | {RunnerState.SHUTTING_DOWN}):
                continue
            if runner is not watched:
                watched, watch = runner, Watch(runner.facts.deadlines.progress)
            progress = runner.engine.progress
            process = read_process(runner.engine.pid, threads=progress.phase is Phase.COMPUTING)
            if process is None or not runner.engine.alive:
                continue
            busy = self.broker.active > 0
            stall = watch.look(Sample(time.monotonic(), process, progress, runner.true_state(), busy))
            if stall is not None:
                reason = Reason.RUNNER_STALLED if stall.peer is None else Reason.PEER_LOST
                runner.fail(reason, stall.message, peer=stall.peer)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a bug in the supervisor: %s", error, exc_info=error)
            if self.runner is not None:
                self.runner.fail(Reason.ENGINE_CRASHED, f"the supervisor failed: {error!r}")
