"""What is around one ModelInstance: the API server, the scheduler, kubelets and supervisors, without any I/O."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from mlx_operator.decide.actions import Notice, Plan, SendTask
from mlx_operator.decide.observed import NodeView, Observed, Refusal, RunnerView, Settings
from mlx_operator.decide.stored import read
from mlx_operator_api import names
from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import ENDED, RunnerState
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import (
    Predecessor,
)
from tests.unit.simulated_supervisor import UID, Supervisor

START = datetime(2026, 11, 23, 15, 0, 0, tzinfo=UTC)


class BrokenPromiseError(AssertionError):
    """A promise of the design does not hold."""


@dataclass
class SimPod:
    manifest: dict[str, Any]
    supervisor: Supervisor | None = None
    partitioned: bool = False


class World:
    """One ModelInstance and everything around it; faults are methods."""

    def __init__(self, runners: int = 2, nodes: int = 2, **spec: Any) -> None:
        self.now = START
        self.version = itertools.count(1)
        self.uids = itertools.count(1)
        self.instance: dict[str, Any] = {
            "metadata": {
                "name": "tiny", "namespace": "default", "uid": UID, "generation": 1, "resourceVersion": "0",
                "annotations": {},
            },
            "spec": {"model": {"source": "pvc://models/tiny"}, "runners": runners, **spec},
        }  # fmt: skip
        self.pods: dict[str, SimPod] = {}
        self.service: dict[str, Any] | None = None
        self.nodes = {f"n{i + 1}": NodeView(f"n{i + 1}", True) for i in range(nodes)}
        self.refusals: dict[str, Refusal] = {}
        self.refuse: Refusal | None = None
        self.keep: Refusal | None = None
        """What is answered to a deletion."""
        self.branch = "1" * 40
        """The commit that the branch of every hub repository is at."""
        self.unplaceable: str | None = None
        self.pull_error: str | None = None
        self.memory_limits: dict[int, int] = {}
        self.notes: dict[str, tuple[str, ...]] = {}
        self.lagging: dict[str, dict[str, Any]] = {}
        self.settings = Settings(runner_image="runner:1", key_id="abcdef0123", started=START)
        self.turn = True
        self.views: dict[str, RunnerView] = {}
        self.patches: list[Status] = []
        self.events: list[Notice] = []
        self.sent: list[SendTask] = []
        self.created: list[str] = []
        self.joined: dict[tuple[int, int], set[tuple[str, str]]] = {}
        self.last_plan: Plan | None = None

    # -- what the operator sees
    def observed(self) -> Observed:
        return Observed(
            instance=copy.deepcopy(self.instance),
            pods=self._watched_pods(),
            settings=self.settings,
            service=copy.deepcopy(self.service),
            runners=dict(self.views),
            nodes=dict(self.nodes),
            refusals=dict(self.refusals),
            pod_events=dict(self.notes),
            turn=self.turn,
        )

    def _watched_pods(self) -> tuple[dict[str, Any], ...]:
        """The pods as the watch has brought them; while it lags, as they were, and what is new."""
        now = {pod.manifest["metadata"]["uid"]: copy.deepcopy(pod.manifest) for pod in self.pods.values()}
        names_now = {manifest["metadata"]["name"] for uid, manifest in now.items() if uid not in self.lagging}
        late = [m for m in self.lagging.values() if m["metadata"]["name"] not in names_now]
        return (*late, *(manifest for uid, manifest in now.items() if uid not in self.lagging))

    def lag(self) -> None:
        """From now on the watch of pods brings nothing of those that it knows."""
        self.lagging = {p.manifest["metadata"]["uid"]: copy.deepcopy(p.manifest) for p in self.pods.values()}

    def catch_up(self) -> None:
        """The watch has brought everything."""
        self.lagging = {}

    @property
    def status(self) -> Status:
        return read(self.instance)

    def condition(self, kind: ConditionType) -> str:
        found = self.status.condition(kind)
        return found.status if found else "Unknown"

    # -- the world
    def _schedule(self) -> bool:
        changed = False
        ready = [node for node in self.nodes.values() if node.ready]
        for pod in self.pods.values():
            spec, status = pod.manifest["spec"], pod.manifest["status"]
            if spec.get("nodeName") or pod.manifest["metadata"].get("deletionTimestamp"):
                continue
            if self.unplaceable or not ready:
                words = self.unplaceable or "0/2 nodes are available: 2 node(s) were not ready."
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
                changed |= status.get("conditions") != [condition]
                status["conditions"] = [condition]
                continue
            taken = [p.manifest["spec"].get("nodeName") for p in self.pods.values()]
            spec["nodeName"] = min(ready, key=lambda node: (taken.count(node.name), node.name)).name
            status["conditions"] = [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": format_time(self.now)}
            ]
            changed = True
        return changed

    def _kubelets(self) -> bool:
        changed = False
        for name, pod in list(self.pods.items()):
            node = self.nodes.get(pod.manifest["spec"].get("nodeName", ""))
            if node is None and pod.manifest["metadata"].get("deletionTimestamp"):
                self._vanish(name)
                changed = True
            if node is None or not node.ready:
                continue
            if pod.manifest["metadata"].get("deletionTimestamp"):
                self._vanish(name)
                changed = True
            elif pod.supervisor is None:
                changed |= self._start_container(pod)
            else:
                changed |= self._probe(pod)
        return changed

    def _start_container(self, pod: SimPod) -> bool:
        status = pod.manifest["status"]
        if self.pull_error:
            waiting = {"reason": "ErrImagePull", "message": self.pull_error}
            status["containerStatuses"] = [{"name": names.CONTAINER, "state": {"waiting": waiting}, "restartCount": 0}]
            return False
        uid = pod.manifest["metadata"]["uid"]
        rank = int(pod.manifest["metadata"]["labels"][names.RANK_LABEL])
        before = (status.get("containerStatuses") or [{}])[0]
        pod.supervisor = Supervisor(rank, f"{format_time(self.now)}-{next(self.uids):04d}", lambda: self.now)
        pod.supervisor.resolve = lambda: self.branch
        pod.supervisor.predecessor = getattr(pod, "last_words", None)
        limit = self.memory_limits.get(rank)
        pod.supervisor.publish(predecessor=pod.supervisor.predecessor, memory_limit_bytes=limit)
        status |= {"phase": "Running", "podIP": f"10.0.0.{int(uid[4:8]) % 250 + 1}"}
        status["containerStatuses"] = [
            {
                "name": names.CONTAINER,
                "restartCount": before.get("restartCount", 0) + (1 if before.get("state") else 0),
                "state": {"running": {"startedAt": format_time(self.now)}},
                "lastState": before.get("state") or {},
            }
        ]
        return True

    def _probe(self, pod: SimPod) -> bool:
        assert pod.supervisor is not None
        serving = pod.supervisor.report.state in (RunnerState.READY, RunnerState.RUNNING)
        ready = {"type": "Ready", "status": "True" if serving or pod.supervisor.rank else "False"}
        conditions = [c for c in pod.manifest["status"]["conditions"] if c["type"] != "Ready"]
        changed = ready not in pod.manifest["status"]["conditions"]
        pod.manifest["status"]["conditions"] = [*conditions, ready]
        return changed

    def _check_commits(self, alive: list[Supervisor]) -> None:
        """No epoch mixes commits of a hub's repository."""
        commits: dict[int, set[str | None]] = {}
        for supervisor in alive:
            report = supervisor.report
            if report.model is not None:
                commits.setdefault(report.epoch, set()).add(report.model.revision)
        if any(len(found) > 1 for found in commits.values()):
            raise BrokenPromiseError(f"ranks of one epoch use different commits: {commits}")

    def _engines(self) -> bool:
        alive = list(self.supervisors())
        self._check_commits(alive)
        changed = False
        for supervisor in alive:
            request = supervisor.running
            together = [s for s in alive if s.report.epoch == supervisor.report.epoch]
            size = supervisor.report.world_size
            connecting = [s for s in together if s.report.state in (RunnerState.CONNECTING, RunnerState.CONNECTED)]
            beyond = [s for s in together if s.report.group == "present"]
            meet = len({s.rank for s in (*connecting, *beyond)}) == size
            warm = sum(s.report.state in (RunnerState.WARMING_UP, RunnerState.READY) for s in together) == size
            changed |= supervisor.work(meet, warm) if request is not None else False
        return changed | self._peers_die(alive)

    def _peers_die(self, alive: list[Supervisor]) -> bool:
        """Whoever holds a group whose other member is gone sees EOF."""
        changed = False
        for supervisor in alive:
            report = supervisor.report
            if report.group != "present" or report.state in (*ENDED, RunnerState.SHUTTING_DOWN):
                continue
            there = {s.rank for s in alive if s.report.epoch == report.epoch and s.report.state not in ENDED}
            lost = set(range(report.world_size)) - there
            if lost:
                peer = min(lost)
                supervisor.fail(Reason.PEER_LOST, f"connection to rank {peer} was lost", peer=peer)
                changed = True
        return changed

    def supervisors(self) -> Iterator[Supervisor]:
        for pod in self.pods.values():
            node = self.nodes.get(pod.manifest["spec"].get("nodeName", ""))
            if pod.supervisor is not None and node is not None and node.ready:
                yield pod.supervisor

    def _vanish(self, name: str) -> None:
        pod = self.pods.pop(name, None)
        if pod is not None:
            self.views.pop(pod.manifest["metadata"]["uid"], None)

    # -- faults
    def supervisor(self, rank: int) -> Supervisor:
        found = self.pods[f"tiny-{rank}"].supervisor
        assert found is not None
        return found

    def kill_engine(self, rank: int) -> None:
        """`kill -9` of the engine."""
        self.supervisor(rank).fail(Reason.ENGINE_CRASHED, "engine killed by signal 9 (SIGKILL)", signal="SIGKILL")

    def kill_container(self, rank: int, reason: str = "OOMKilled", message: str = "") -> None:
        """Supervisor and engine at once, as the kernel's OOM killer does on cgroup v2."""
        pod = self.pods[f"tiny-{rank}"]
        if pod.supervisor is None:
            return
        report = pod.supervisor.report
        pod.last_words = Predecessor(  # type: ignore[attr-defined]
            incarnation=report.incarnation,
            epoch=report.epoch,
            state=report.state,
            last_report=self.now,
            failure=report.failure,
        )
        pod.supervisor = None
        self.lose_stream(f"tiny-{rank}")
        ended = {"exitCode": 137, "reason": reason, "finishedAt": format_time(self.now), "message": message}
        status = pod.manifest["status"]["containerStatuses"][0]
        status["state"] = {"terminated": ended}

    def delete(self, name: str) -> None:
        """Somebody deletes a pod."""
        if name in self.pods:
            self.pods[name].manifest["metadata"].setdefault("deletionTimestamp", format_time(self.now))

    def move_branch(self, number: int) -> None:
        """Somebody pushes to the hub."""
        self.branch = str(number) * 40

    def lose_report(self, rank: int) -> None:
        """The report stream breaks for a moment."""
        self.lose_stream(f"tiny-{rank}")

    def wait(self, seconds: float) -> None:
        """A long time in which nobody plans."""
        self.now += timedelta(seconds=seconds)

    def lose_node(self, node: str) -> None:
        self.nodes[node] = NodeView(node, False, self.now, "NodeStatusUnknown")
        for name, pod in self.pods.items():
            if pod.manifest["spec"].get("nodeName") == node:
                self.lose_stream(name)

    def heal_node(self, node: str) -> None:
        self.nodes[node] = NodeView(node, True, self.now)

    def change(self, **spec: Any) -> None:
        """`kubectl apply` of another spec."""
        self.instance["spec"] |= spec
        self.instance["metadata"]["generation"] += 1

    def annotate(self, name: str, value: str) -> None:
        self.instance["metadata"]["annotations"][name] = value

    def lose_stream(self, name: str) -> None:
        uid = self.pods[name].manifest["metadata"]["uid"]
        if uid in self.views:
            self.views[uid] = replace(self.views[uid], connected=False, error="connection lost")
