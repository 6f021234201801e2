"""Supervisors of the model: the production state machine, brought back to life from its report for each step."""

from collections.abc import Callable
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import ENDED, SERVING, RunnerState, TaskName
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import (
    ConnectToGroup,
    CreateRunner,
    DownloadModel,
    LoadModel,
    ModelFacts,
    Predecessor,
    RunnerReport,
    Shutdown,
    StartWarmup,
    Task,
    TaskPhase,
    TaskRequest,
)
from mlx_runner.supervisor.machine import Machine

from . import normal
from .state import T0, UID, Message, Process, Tables

FOUND: dict[TaskName, dict[str, Any]] = {
    TaskName.DOWNLOAD_MODEL: {"model_available": True, "model": ModelFacts(digest="sha256:abc", bytes=10**9)},
    TaskName.CONNECT_TO_GROUP: {"group": "present"},
}
"""What a task finds out."""


class Supervisors:
    """Every step is one of `Machine`; each is taken once and then remembered."""

    def __init__(self, tables: Tables, size: int) -> None:
        self._reports = tables.reports
        self._size = size
        self._known: dict[tuple[Any, ...], Any] = {}

    def start(self, words: int | None, incarnation: int) -> Process:
        """A new process; `words`: the last report of the one before it in the same pod."""
        before = None
        if words is not None:
            last = self._reports[words]
            before = Predecessor(
                incarnation="", epoch=last.epoch, state=last.state, last_report=T0, failure=last.failure
            )
        machine = Machine(UID, 0, now=lambda: T0, predecessor=before)
        return Process(incarnation, self._reports.id(normal.report(machine.report)), ())

    def offer(self, process: Process, message: Message) -> Process:
        """A task arrives."""
        made = self._step(
            ("offer", process.report, message.task, message.epoch, message.attempt),
            lambda machine: machine.offer(self._request(message)).run,
        )
        report, ran = made
        engines = process.engines
        if ran and message.task is TaskName.CREATE_RUNNER:
            engines = self.replace(engines, message.epoch)
        return process._replace(report=report, engines=engines)

    def replace(self, engines: tuple[int, ...], epoch: int) -> tuple[int, ...]:
        """The engine of a new epoch: what ran before was killed and waited for."""
        return (epoch,)

    def heard(self, report: int) -> int:
        """The report as the operator takes it."""
        return self._reports.id(normal.heard(self._reports[report]))

    def rejects(self, report: int, message: Message) -> bool:
        """Whether a supervisor that has just made this report would reject the task."""

        def phase(machine: Machine) -> TaskPhase:
            return machine.offer(self._request(message)).outcome.phase

        made = self._step(("phase", report, message.task, message.epoch, message.attempt), phase)
        return made[1] is TaskPhase.REJECTED

    def running(self, report: int) -> TaskName | None:
        """The task that the engine works on."""
        found = self._reports[report]
        names = (task.name for task in found.tasks if task.phase is TaskPhase.RUNNING and task.epoch == found.epoch)
        return next(names, None)

    def complete(self, process: Process) -> Process:
        """The task that runs is done."""
        name = self.running(process.report)
        assert name is not None
        made = self._step(
            ("complete", process.report), lambda machine: machine.complete(machine.epoch, name, **FOUND.get(name, {}))
        )
        return process._replace(report=made[0])

    def fail(self, process: Process, reason: Reason, peer: int | None = None) -> Process:
        """The runner failed: its engine is killed and reaped."""

        def step(machine: Machine) -> bool:
            why = LastFailure(epoch=machine.epoch, time=T0, state=machine.state, reason=reason, message=normal.WORDS)
            return machine.fail(machine.epoch, why, peer)

        return process._replace(report=self._step(("fail", process.report, reason, peer), step)[0], engines=())

    def fail_download(self, process: Process) -> Process:
        """A download failed; the runner lives on."""
        name, why = TaskName.DOWNLOAD_MODEL, Reason.MODEL_UNREACHABLE
        made = self._step(
            ("no download", process.report), lambda machine: machine.fail_task(machine.epoch, name, reason=why)
        )
        return process._replace(report=made[0])

    def told_to_stop(self, process: Process) -> Process:
        """SIGTERM: while it serves, requests may finish before its engine is shut down."""

        def step(machine: Machine) -> None:
            serves = machine.state in SERVING and not machine.report.draining
            machine.drain()
            if not serves:
                machine.shut_down(machine.epoch)

        return process._replace(report=self._step(("stop", process.report), step)[0])

    def ended(self, process: Process) -> Process:
        """The engine is gone after a shutdown."""
        made = self._step(("ended", process.report), lambda machine: machine.ended(machine.epoch))
        return process._replace(report=made[0], engines=())

    def works(self, report: RunnerReport) -> bool:
        """Whether it holds an engine that can still fail."""
        return report.epoch > 0 and report.state not in (*ENDED, RunnerState.SHUTTING_DOWN)

    def _step(self, key: tuple[Any, ...], step: Callable[[Machine], Any]) -> tuple[int, Any]:
        known: tuple[int, Any] | None = self._known.get(key)
        if known is None:
            machine = revive(self._reports[key[1]])
            answer = step(machine)
            known = self._known[key] = (self._reports.id(normal.report(machine.report)), answer)
        return known

    def _request(self, message: Message) -> TaskRequest:
        return TaskRequest(
            instance_uid=UID, epoch=message.epoch, rank=0, attempt=message.attempt, task=self._task(message.task)
        )

    def _task(self, name: TaskName) -> Task:
        match name:
            case TaskName.CREATE_RUNNER:
                return CreateRunner(world_size=self._size, source="pvc://models/tiny", served_name="tiny")
            case TaskName.DOWNLOAD_MODEL:
                return DownloadModel()
            case TaskName.CONNECT_TO_GROUP:
                return ConnectToGroup(peers=())
            case TaskName.LOAD_MODEL:
                return LoadModel()
            case TaskName.START_WARMUP:
                return StartWarmup()
            case TaskName.SHUTDOWN:
                return Shutdown()
        raise AssertionError(f"the operator does not send {name}")


def revive(report: RunnerReport) -> Machine:
    """The state machine that made this report: a report is complete each time."""
    machine = Machine(report.instance_uid, report.rank, now=lambda: T0)
    machine._report = report
    machine._outcomes = {task.name: task for task in report.tasks if task.phase is not TaskPhase.REJECTED}
    machine._rejections = {task.name: task for task in report.tasks if task.phase is TaskPhase.REJECTED}
    return machine
