"""A pure cluster for the planner: API server, scheduler, kubelets and supervisors that decide by the real table.

No I/O, no clock but its own. Faults are methods. What breaks a promise of the design raises `BrokenPromiseError`.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from mlx_operator.decide.actions import Action, ApplyService, CreatePod, DeletePod, Plan, SendTask
from mlx_operator.decide.observed import RunnerView
from mlx_operator.decide.plan import plan
from mlx_operator_api import names
from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.runner import judge
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import (
    ConnectToGroup,
    CreateRunner,
    TaskRequest,
)
from tests.unit.simulated_world import START, BrokenPromiseError, SimPod, World

__all__ = ["START", "BrokenPromiseError", "Cluster"]


class Cluster(World):
    """A world with an operator that can be stopped at any point."""

    # -- the operator
    def reconcile(self, *, act: bool = True) -> Plan:
        """One pass in the order of effects: status, then actions, then events. `act` False: killed after the write."""
        made = plan(self.observed(), self.now)
        self.last_plan = made
        before = self.status
        if made.status.model_dump(mode="json") != before.model_dump(mode="json"):
            self._check_memory(before, made.status)
            self.instance["status"] = made.status.model_dump(mode="json", by_alias=True, exclude_none=True)
            self.instance["metadata"]["resourceVersion"] = str(next(self.version))
            self.patches.append(self.status)
        if act:
            for action in made.actions:
                self._act(action)
            self.events.extend(made.events)
        return made

    def _check_memory(self, before: Status, after: Status) -> None:
        if after.epoch < before.epoch:
            raise BrokenPromiseError(f"the epoch went back from {before.epoch} to {after.epoch}")
        known = {failure.epoch for failure in before.history[:4]}
        if not known <= {failure.epoch for failure in after.history}:
            raise BrokenPromiseError(f"a failure was lost: {known} not in {after.history}")
        rules = (self.instance["spec"].get("restartPolicy") or {}).get("maxRestarts", 5)
        if after.restarts > rules:
            raise BrokenPromiseError(f"budget overspent: {after.restarts} of {rules}")
        for condition in after.conditions:
            if not condition.message or len(condition.message) > 1024:
                raise BrokenPromiseError(f"{condition.type}: message of {len(condition.message)} characters")
        for record in after.runners:
            old = before.runner(record.rank)
            if record.epoch < old.epoch:
                raise BrokenPromiseError(f"rank {record.rank} went back to epoch {record.epoch}")

    def _act(self, action: Action) -> None:
        match action:
            case ApplyService():
                self.service = {**action.manifest, "metadata": {**action.manifest["metadata"], "uid": "service"}}
            case CreatePod():
                self._create_pod(action)
            case DeletePod():
                self._delete_pod(action)
            case SendTask():
                self._send(action)

    def _create_pod(self, action: CreatePod) -> None:
        if action.name in self.pods:
            raise BrokenPromiseError(f"pod {action.name} is created although it exists")
        if self.refuse is not None:
            self.refusals[action.name] = replace(self.refuse, time=self.now)
            return
        self.refusals.pop(action.name, None)
        self.created.append(action.name)
        manifest = copy.deepcopy(action.manifest)
        manifest["metadata"] |= {
            "uid": f"pod-{next(self.uids):04d}-0000",
            "creationTimestamp": format_time(self.now),
        }
        manifest["status"] = {"phase": "Pending"}
        self.pods[action.name] = SimPod(manifest)

    def _delete_pod(self, action: DeletePod) -> None:
        pod = self.pods.get(action.name)
        if pod is None or pod.manifest["metadata"]["uid"] != action.uid:
            return
        if self.keep is not None:
            self.refusals[action.uid] = replace(self.keep, time=self.now)
            return
        self.refusals.pop(action.uid, None)
        if action.grace_seconds == 0:
            self._vanish(action.name)
        else:
            self.delete(action.name)

    def _send(self, action: SendTask) -> None:
        pod = self.pods.get(action.pod)
        self.sent.append(action)
        if pod is None or pod.manifest["metadata"]["uid"] != action.pod_uid:
            return
        supervisor = pod.supervisor
        if supervisor is None or not self._in_touch(pod):
            return
        request, uid = action.request, action.pod_uid
        # The planner may act on a report that is a moment old: only what it knew is its promise.
        known = self.views[uid].report
        if known is not None and known.seq == supervisor.report.seq and known.incarnation == supervisor.incarnation:
            duplicate = request.task.name in supervisor.outcomes and request.epoch == known.epoch
            rejected = judge(request.task.name, request.epoch, supervisor.standing)
            if rejected is not None and not duplicate:
                raise BrokenPromiseError(rejected.line())
        if isinstance(request.task, ConnectToGroup):
            self._check_peers(request)
        supervisor.offer(request)
        if isinstance(request.task, CreateRunner):
            key = (request.epoch, request.rank)
            homes = self.joined.setdefault(key, set())
            homes.add((uid, supervisor.incarnation))
            if len(homes) > 1:
                raise BrokenPromiseError(f"epoch {request.epoch} has two engines of rank {request.rank}: {homes}")
        self.hear(uid)

    def _check_peers(self, request: TaskRequest) -> None:
        status = self.status
        if any(record.epoch != request.epoch for record in status.runners):
            raise BrokenPromiseError("ConnectToGroup went out before every rank was recorded as joined")

    def deliver_again(self, action: SendTask) -> None:
        """A task of before arrives once more: it must be harmless, whatever has happened since."""
        pod = self.pods.get(action.pod)
        if pod is None or pod.manifest["metadata"]["uid"] != action.pod_uid or pod.supervisor is None:
            return
        engines = list(pod.supervisor.engines)
        state = pod.supervisor.report.state
        pod.supervisor.offer(action.request)
        newest = max(engines, default=0)
        if pod.supervisor.engines != engines and action.request.epoch <= newest:
            raise BrokenPromiseError(f"a repeated CreateRunner({action.request.epoch}) started a second engine")
        if action.request.epoch < newest and pod.supervisor.report.state is not state:
            raise BrokenPromiseError(f"a task of epoch {action.request.epoch} changed epoch {newest}")

    # -- reports
    def hear(self, uid: str) -> None:
        """The newest report of a pod reaches the operator."""
        pod = next((p for p in self.pods.values() if p.manifest["metadata"]["uid"] == uid), None)
        if pod is None or pod.supervisor is None or not self._in_touch(pod):
            return
        self.views[uid] = RunnerView(report=pod.supervisor.report, received=self.now, connected=True)

    def _in_touch(self, pod: SimPod) -> bool:
        node = self.nodes.get(pod.manifest["spec"].get("nodeName", ""))
        return not pod.partitioned and node is not None and node.ready and self._has_our_token(pod)

    def _has_our_token(self, pod: SimPod) -> bool:
        """A runner lets nobody in with the token of another key."""
        metadata = self.instance["metadata"]
        ours = names.secret_name(metadata["name"], metadata["uid"], self.settings.key_id)
        secrets = [volume["secret"]["secretName"] for volume in pod.manifest["spec"]["volumes"] if "secret" in volume]
        return ours in secrets

    def hear_all(self) -> None:
        for pod in list(self.pods.values()):
            self.hear(pod.manifest["metadata"]["uid"])

    def restart_operator(self) -> None:
        """A new operator process: all truth is in status and the runners."""
        self.views.clear()
        self.settings = replace(self.settings, started=self.now)

    # -- running on
    def tick(self, seconds: float = 0.2) -> bool:
        """Time passes, and everything that can go on does one step. True when anything changed."""
        self.now += timedelta(seconds=seconds)
        changed = [step() for step in (self._schedule, self._kubelets, self._engines)]
        return any(changed)

    def run(self, seconds: float = 60.0, step: float = 0.2, until: Callable[[], bool] | None = None) -> None:
        """Let everything go on, hearing every report, until nothing happens any more and nothing is planned."""
        end = self.now + timedelta(seconds=seconds)
        while self.now < end:
            if until is not None and until():
                return
            moved = self.tick(step)
            self.hear_all()
            patches, actions = len(self.patches), len(self.sent)
            made = self.reconcile()
            quiet = not moved and len(self.patches) == patches and len(self.sent) == actions and not made.actions
            if quiet and until is None:
                if made.requeue_at is None or made.requeue_at > end:
                    return
                self.now = max(self.now, made.requeue_at)

    def ready(self) -> bool:
        return self.condition(ConditionType.READY) == "True"

    def stalled(self) -> bool:
        return self.condition(ConditionType.STALLED) == "True"
