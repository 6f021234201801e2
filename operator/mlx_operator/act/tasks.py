"""Sends tasks to runners beside the reconcile: one that hangs must not keep a failure out of status.

One task is under way per pod. Another one for the same pod waits for the next plan, which the answer brings about.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

from mlx_operator.act.runner import RunnerError, RunnerPort
from mlx_operator.decide.actions import SendTask
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe.runners import Urgency, lean, receive, stranger
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api.runner import TaskName
from mlx_operator_api.tasks import RunnerReport, TaskAnswer, TaskPhase

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 5.0
_SAME_INSTANT_SECONDS = 0.001
"""Timers fire up to a clock's resolution early."""


class TaskSender:
    """Keeps at most one task under way per pod; repeats nothing by itself."""

    def __init__(
        self,
        store: Store,
        port: RunnerPort,
        *,
        token_of: Callable[[str], str],
        changed: Callable[[Key, Urgency], None],
        later: Callable[[Key, float], None],
        now: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._port = port
        self._token_of = token_of
        self._changed = changed
        self._later = later
        self._now = now
        self._metrics = metrics
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def send(self, key: Key, action: SendTask, *, reason: str | None = None) -> None:
        """Begin to send, unless something is under way to the pod or its last failure is too fresh.

        `reason` is that of Ready, for the log.
        """
        uid = action.pod_uid
        if uid in self._under_way:
            return
        wait = self._not_before.get(uid, 0.0) - asyncio.get_running_loop().time()
        if wait > _SAME_INSTANT_SECONDS:
            self._later(key, wait)
            return
        task = asyncio.create_task(self._send(key, action, reason), name=f"{action.request.task.name} to {action.pod}")
        self._under_way[uid] = task
        task.add_done_callback(lambda done: self._ended(key, uid, done))

    def forget(self, uid: str) -> None:
        """The pod is gone."""
        self._failures.pop(uid, None)
        self._not_before.pop(uid, None)

    async def close(self) -> None:
        """Give up what is under way; the next leader's plan sends it again."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, key: Key, uid: str, task: asyncio.Task[None]) -> None:
        del self._under_way[uid]
        if self._store.pod(uid) is None:
            self.forget(uid)  # it went while the task was under way
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._metrics.bugs.inc()
            decision("bug while sending a task", level=logging.ERROR, error=error, traceback=True, instance=key)
        # Whatever came of it: what had to wait for it can go on.
        self._changed(key, Urgency.AT_ONCE)

    async def _send(self, key: Key, action: SendTask, reason: str | None) -> None:
        request = action.request
        about: dict[str, Any] = {"instance": key, "epoch": request.epoch, "rank": request.rank, "reason": reason}
        about["pod"] = action.pod
        task = request.task.name
        if self._store.owner(action.pod_uid) != request.instance_uid:  # it would be given the instance's token
            decision(f"{task} not sent: the pod is not the instance's", level=logging.WARNING, **about)
            self._back_off(action.pod_uid)
            return
        try:
            answer = await self._port.send(action.pod_ip, self._token_of(request.instance_uid), request)
        except RunnerError as error:
            self._metrics.tasks.labels(task, "error").inc()
            decision(f"{task} not delivered", level=logging.WARNING, **about, status=error.status, why=str(error))
            self._back_off(action.pod_uid)
            return
        self._metrics.tasks.labels(task, answer.outcome.phase).inc()
        self._log(task, answer, about)
        if self._heard(action.pod_uid, answer.report):
            self.forget(action.pod_uid)
        else:
            self._back_off(action.pod_uid)  # the next plan is the same, and comes at once

    def _heard(self, uid: str, report: RunnerReport) -> bool:
        """Keep the report in an answer, unless it is not of the runner that we know."""
        pod = self._store.pod(uid)
        if pod is None or stranger(pod, report) is not None:
            return False
        view, _ = receive(self._store.view(uid), lean(report), self._now(), stream=False)
        self._store.set_view(uid, view)
        return view.report is not None and view.report.incarnation == report.incarnation

    def _back_off(self, uid: str) -> None:
        failures = self._failures[uid] = self._failures.get(uid, 0) + 1
        delay = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 16))
        self._not_before[uid] = asyncio.get_running_loop().time() + delay

    @staticmethod
    def _log(task: TaskName, answer: TaskAnswer, about: dict[str, Any]) -> None:
        outcome = answer.outcome
        if outcome.phase is TaskPhase.REJECTED and outcome.rejection is not None:
            decision(outcome.rejection.line(), level=logging.WARNING, **about)
        else:
            decision(f"{task} sent", **about, outcome=outcome.phase, state=answer.report.state)
