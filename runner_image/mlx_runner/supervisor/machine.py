"""The state machine of one runner: decisions on tasks, and the report that tells everything.

Free of I/O. Every change publishes a report with the next `seq`. The order within the stream is fixed: the transient
state, then the acknowledgement (outcome Running); the completion (outcome Complete), then the settled state. So a
reader that sees an outcome has seen the state that belongs to it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlx_operator_api.runner import ENDED, ORDER, SERVING, TRANSITIONS, RunnerState, Standing, TaskName, judge
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import CreateRunner, Predecessor, RunnerReport, TaskOutcome, TaskPhase, TaskRequest

log = logging.getLogger(__name__)

Listener = Callable[[RunnerReport], None]


class BackwardsTransitionError(RuntimeError):
    """A bug of ours: within an epoch a state never goes back."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Answer to an offered task. `run`: it was accepted just now, so it must be carried out."""

    outcome: TaskOutcome
    run: bool


def utc_now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


class Machine:
    """State, tasks and facts of the runner of the current epoch. Calls that concern another epoch have no effect."""

    def __init__(
        self,
        instance_uid: str,
        rank: int,
        *,
        now: Callable[[], datetime] = utc_now,
        predecessor: Predecessor | None = None,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self._now = now
        started = now()
        self._listeners: list[Listener] = []
        self._outcomes: dict[TaskName, TaskOutcome] = {}
        self._rejections: dict[TaskName, TaskOutcome] = {}
        self._report = RunnerReport(
            instance_uid=instance_uid,
            rank=rank,
            incarnation=started.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            seq=1,
            since=started,
            predecessor=predecessor,
            memory_limit_bytes=memory_limit_bytes,
        )

    # -- reading
    @property
    def report(self) -> RunnerReport:
        """The last report."""
        return self._report

    @property
    def state(self) -> RunnerState:
        """The state of the runner."""
        return self._report.state

    @property
    def epoch(self) -> int:
        """The epoch of the runner; 0: none yet."""
        return self._report.epoch

    @property
    def standing(self) -> Standing:
        """All that a decision depends on."""
        r = self._report
        return Standing(
            state=r.state,
            epoch=r.epoch,
            world_size=r.world_size,
            rank=r.rank,
            group=r.group,
            model_available=r.model_available,
        )

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every report from now on; returns the way to end that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def running(self, name: TaskName) -> TaskOutcome | None:
        """The outcome of a task that is under way."""
        outcome = self._outcomes.get(name)
        return outcome if outcome is not None and outcome.phase is TaskPhase.RUNNING else None

    # -- tasks
    def offer(self, request: TaskRequest) -> Offer:
        """Decide on a task: known (its present outcome), rejected, or accepted (`run`)."""
        name = request.task.name
        known = self._outcomes.get(name) if request.epoch == self.epoch else None
        if known is not None and (request.attempt <= known.attempt or known.phase is TaskPhase.RUNNING):
            return Offer(known, run=False)
        rejection = judge(name, request.epoch, self.standing)
        if rejection is not None:
            log.warning(rejection.line())
            outcome = TaskOutcome(
                name=name, epoch=request.epoch, attempt=request.attempt, phase=TaskPhase.REJECTED, rejection=rejection
            )
            self._rejections[name] = outcome
            self._publish()
            return Offer(outcome, run=False)
        self._log_accepted(request)
        if isinstance(request.task, CreateRunner):
            self._start_epoch(request.epoch, request.task)
        elif name is TaskName.SHUTDOWN and self.state in ENDED:
            # The state stays: a failure keeps its evidence, and there is nothing left to end.
            return Offer(self._record(request, TaskPhase.COMPLETE), run=False)
        elif (via := TRANSITIONS[name].via) is not None and via is not self.state:
            self._enter(via)
        if name is TaskName.SHUTDOWN:
            self._end_running(f"ended by {name}")
        return Offer(self._record(request, TaskPhase.RUNNING), run=True)

    def complete(self, epoch: int, name: TaskName, **facts: Any) -> bool:
        """A task is done: its outcome first (with the facts it found), then the state it settles in."""
        if epoch != self.epoch or self.running(name) is None:
            return False
        self._outcomes[name] = self._outcomes[name].model_copy(update={"phase": TaskPhase.COMPLETE})
        self._publish(**facts)
        settled = TRANSITIONS[name].to
        if settled is not None:
            self._enter(settled)
        return True

    def fail_task(self, epoch: int, name: TaskName, **why: Any) -> bool:
        """A task failed and the runner lives on in its state (DownloadModel)."""
        if epoch != self.epoch or self.running(name) is None:
            return False
        self._outcomes[name] = self._outcomes[name].model_copy(update={"phase": TaskPhase.FAILED, **why})
        self._publish()
        return True

    def fail(self, epoch: int, failure: LastFailure, peer: int | None = None) -> bool:
        """The runner failed: the first failure of an epoch stays."""
        if epoch != self.epoch or self.state in ENDED:
            return False
        if self._end_running(failure.message, reason=failure.reason):
            self._publish()
        self._enter(RunnerState.FAILED, failure=failure, peer=peer, group="absent", active_requests=0)
        return True

    # -- what the supervisor itself decides
    def shut_down(self, epoch: int) -> None:
        """SIGTERM, without a task: → ShuttingDown."""
        if epoch == self.epoch and epoch > 0 and ORDER[self.state] < ORDER[RunnerState.SHUTTING_DOWN]:
            self._enter(RunnerState.SHUTTING_DOWN)
            if self._end_running("ended by SIGTERM"):
                self._publish()

    def ended(self, epoch: int) -> None:
        """The engine is gone after a shutdown: completes the task, if there is one, and → Shutdown."""
        if epoch != self.epoch or self.state is not RunnerState.SHUTTING_DOWN:
            return
        if not self.complete(epoch, TaskName.SHUTDOWN, group="absent", active_requests=0):
            self._enter(RunnerState.SHUTDOWN, group="absent", active_requests=0)

    def drain(self) -> None:
        """SIGTERM was received."""
        self.note(draining=True)

    def requests(self, active: int) -> None:
        """The number of requests in the engine: Ready while it is 0, else Running."""
        if self.state not in SERVING:
            return
        state = RunnerState.RUNNING if active else RunnerState.READY
        if state is self.state:
            # Told with the next report: a report for each request would only be noise.
            self._report = self._report.model_copy(update={"active_requests": active})
        else:
            self._enter(state, active_requests=active)

    def note(self, **facts: Any) -> None:
        """Facts for the report (progress, the ranks waited for, …); published if any changed."""
        if any(getattr(self._report, name) != value for name, value in facts.items()):
            self._publish(**facts)

    def heartbeat(self, steps: int) -> RunnerReport:
        """The report again, with a higher `seq`; the listeners are not told."""
        self._report = self._report.model_copy(update={"seq": self._report.seq + 1, "steps": steps})
        return self._report

    # -- the one way each
    def _enter(self, state: RunnerState, **facts: Any) -> None:
        """The only place where a state changes within an epoch."""
        back_to_ready = self.state is RunnerState.RUNNING and state is RunnerState.READY
        if ORDER[state] <= ORDER[self.state] and not back_to_ready:
            raise BackwardsTransitionError(f"{self.state} → {state} in epoch {self.epoch}")
        # Ready and Running alternate with every request: no news for the pod's log.
        quiet = {self.state, state} <= SERVING
        log.log(logging.DEBUG if quiet else logging.INFO, "%s -> %s epoch=%d", self.state, state, self.epoch)
        self._publish(state=state, since=self._now(), **facts)

    def _start_epoch(self, epoch: int, task: CreateRunner) -> None:
        """A new runner: nothing of the old one stays but who we are."""
        self._outcomes.clear()
        self._rejections.clear()
        old = self._report
        self._report = RunnerReport(
            instance_uid=old.instance_uid,
            rank=old.rank,
            incarnation=old.incarnation,
            seq=old.seq,
            epoch=epoch,
            world_size=task.world_size,
            since=self._now(),
            predecessor=old.predecessor,
            memory_limit_bytes=old.memory_limit_bytes,
            draining=old.draining,
        )
        self._publish()

    def _record(self, request: TaskRequest, phase: TaskPhase) -> TaskOutcome:
        name = request.task.name
        outcome = TaskOutcome(name=name, epoch=request.epoch, attempt=request.attempt, phase=phase)
        self._rejections.pop(name, None)
        self._outcomes.pop(name, None)
        self._outcomes[name] = outcome
        self._publish()
        return outcome

    def _end_running(self, message: str, *, reason: Any = None) -> bool:
        """Mark what was under way as failed; True if there was anything."""
        names = [name for name in self._outcomes if self.running(name) is not None]
        for name in names:
            why = {"phase": TaskPhase.FAILED, "message": message, "reason": reason}
            self._outcomes[name] = self._outcomes[name].model_copy(update=why)
        return bool(names)

    def _publish(self, **changes: Any) -> None:
        tasks = (*self._outcomes.values(), *self._rejections.values())
        self._report = self._report.model_copy(update={**changes, "tasks": tasks, "seq": self._report.seq + 1})
        for listener in tuple(self._listeners):
            listener(self._report)

    def _log_accepted(self, request: TaskRequest) -> None:
        size = request.task.world_size if isinstance(request.task, CreateRunner) else self._report.world_size
        log.info(
            f"{request.task.name} accepted: state={self.state} world_size={size} rank={self._report.rank} "
            f"epoch={request.epoch} group={self._report.group}"
        )
