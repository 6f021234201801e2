"""A runner's supervisor for the planner's tests: it decides by the real transition table, its engine is instant."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import ENDED, TRANSITIONS, RunnerState, Standing, TaskName, judge
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import (
    PROTOCOL,
    CreateRunner,
    DownloadModel,
    ModelFacts,
    Predecessor,
    RunnerReport,
    Sharding,
    TaskOutcome,
    TaskPhase,
    TaskRequest,
)

UID = "6f1f4e2a-0000-4000-8000-000000000001"


@dataclass
class Supervisor:
    """PID 1 of a runner pod: the real table, an instant engine. `pace` says how many ticks a task takes."""

    rank: int
    incarnation: str
    now: Callable[[], datetime]
    predecessor: Predecessor | None = None
    report: RunnerReport = field(init=False)
    outcomes: dict[TaskName, TaskOutcome] = field(default_factory=dict)
    rejections: list[TaskOutcome] = field(default_factory=list)
    protocol: int = PROTOCOL
    running: TaskRequest | None = None
    download_fails: Reason | None = None
    download_words: str = "no config.json at /models/source"
    sharding: Sharding = Sharding.PIPELINE
    resolve: Callable[[], str] = lambda: "0" * 40
    """The commit that a branch of the hub is at now."""
    source: str = ""
    adapter: str = ""
    note: str | None = None
    """What its engine says of the shard."""
    engines: list[int] = field(default_factory=list)
    """Epochs for which an engine was started here."""

    def __post_init__(self) -> None:
        self.report = RunnerReport(
            instance_uid=UID,
            rank=self.rank,
            incarnation=self.incarnation,
            seq=1,
            since=self.now(),
            predecessor=self.predecessor,
        )

    @property
    def standing(self) -> Standing:
        r = self.report
        return Standing(
            state=r.state,
            epoch=r.epoch,
            world_size=r.world_size,
            rank=r.rank,
            group=r.group,
            model_available=r.model_available,
        )

    def offer(self, request: TaskRequest) -> TaskOutcome:
        name = request.task.name
        known = self.outcomes.get(name) if request.epoch == self.report.epoch else None
        if known is not None and (request.attempt <= known.attempt or known.phase is TaskPhase.RUNNING):
            return known
        rejection = judge(name, request.epoch, self.standing)
        if rejection is not None:
            outcome = TaskOutcome(
                name=name, epoch=request.epoch, attempt=request.attempt, phase=TaskPhase.REJECTED, rejection=rejection
            )
            self.rejections.append(outcome)
            self.publish()
            return outcome
        if isinstance(request.task, CreateRunner):
            self._create(request.epoch, request.task)
        elif name is TaskName.SHUTDOWN and self.report.state in ENDED:
            return self._record(request, TaskPhase.COMPLETE)
        elif (via := TRANSITIONS[name].via) is not None:
            self.publish(state=via, since=self.now())
        self.running = request
        return self._record(request, TaskPhase.RUNNING)

    def _create(self, epoch: int, task: CreateRunner) -> None:
        self.outcomes.clear()
        self.rejections.clear()
        self.engines.append(epoch)
        self.sharding = task.sharding
        self.source, self.adapter = task.source, task.adapter or ""
        self.report = RunnerReport(
            instance_uid=UID,
            rank=self.rank,
            incarnation=self.incarnation,
            seq=self.report.seq,
            epoch=epoch,
            world_size=task.world_size,
            since=self.now(),
            predecessor=self.predecessor,
            memory_limit_bytes=self.report.memory_limit_bytes,
        )

    def _record(self, request: TaskRequest, phase: TaskPhase) -> TaskOutcome:
        outcome = TaskOutcome(name=request.task.name, epoch=request.epoch, attempt=request.attempt, phase=phase)
        self.outcomes[outcome.name] = outcome
        self.publish()
        return outcome

    def work(self, peers_connect: bool, warm: bool) -> bool:
        """One step of the task that runs; True when something changed."""
        request = self.running
        if request is None:
            return False
        name = request.task.name
        facts: dict[str, Any] = {}
        if name is TaskName.DOWNLOAD_MODEL:
            if self.download_fails is not None:
                return self._fail_download()
            assert isinstance(request.task, DownloadModel)
            if self._resolved(request.task):
                return True
            known = self.report.model or ModelFacts()
            found = {"digest": f"sha256:abc{known.revision}", "bytes": 10**9, "layers": 24}
            model = known.model_copy(update=found)
            facts = {"model_available": True, "model": model}
        if name is TaskName.CONNECT_TO_GROUP:
            if self.sharding is Sharding.TENSOR and not self.report.ring_listening:
                self.publish(ring_listening=True)
                return True
            if not peers_connect:
                return False
            facts = {"group": "present"}
        if name is TaskName.LOAD_MODEL:
            facts = {"layers": "0-11", "layers_loaded": 12, "layers_total": 12, "note": self.note}
        if name is TaskName.START_WARMUP and not warm:
            return False
        self.running = None
        self.outcomes[name] = self.outcomes[name].model_copy(update={"phase": TaskPhase.COMPLETE})
        settled = TRANSITIONS[name].to
        if settled is not None:
            facts |= {"state": settled, "since": self.now()}
        self.publish(**facts)
        return True

    def _resolved(self, task: DownloadModel) -> bool:
        """The first step of a download from the hub: the commits are reported. True when it was just done."""
        hub = any(source.startswith("hf://") for source in (self.source, self.adapter))
        if not hub or self.report.model is not None:
            return False
        revision = task.revision or self.resolve() if self.source.startswith("hf://") else None
        adapter = task.adapter_revision or self.resolve() if self.adapter.startswith("hf://") else None
        self.publish(model=ModelFacts(revision=revision, adapter_revision=adapter))
        return True

    def _fail_download(self) -> bool:
        name, self.running = TaskName.DOWNLOAD_MODEL, None
        why = {"phase": TaskPhase.FAILED, "reason": self.download_fails, "message": self.download_words}
        self.outcomes[name] = self.outcomes[name].model_copy(update=why)
        self.publish()
        return True

    def fail(self, reason: Reason, message: str, peer: int | None = None, signal: str | None = None) -> None:
        if self.report.state in ENDED or self.report.epoch == 0 or self.report.state is RunnerState.PENDING:
            return
        self.running = None
        failure = LastFailure(
            epoch=self.report.epoch,
            time=self.now(),
            state=self.report.state,
            reason=reason,
            message=f"{message} in {self.report.state}",
            signal=signal,
        )
        self.publish(state=RunnerState.FAILED, since=self.now(), failure=failure, peer=peer, group="absent")

    def publish(self, **changes: Any) -> None:
        tasks = (*self.outcomes.values(), *self.rejections)
        always = {"tasks": tasks, "seq": self.report.seq + 1}
        self.report = self.report.model_copy(update={"protocol": self.protocol, **changes, **always})
