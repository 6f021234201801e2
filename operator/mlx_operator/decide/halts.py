"""When nothing is to be run: the spec cannot be used, or the instance is suspended."""

from dataclasses import dataclass

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import ModelStatus, RunnerStatus, Status

from . import children, departures, events, facts, failure, runners, writes
from .actions import Notice, Plan, Step
from .conditions import Fact
from .facts import Situation
from .messages import clauses
from .observed import Manifest
from .picture import Clock, Picture, Rank
from .stored import finish

_C = ConditionType


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why nothing can be run from the spec as it is."""

    reason: Reason
    words: str


def refuse(instance: Manifest, old: Status, past: Picture | None, fault: Unusable, clock: Clock) -> Plan:
    """A spec that cannot be used: said, and nothing is changed. What runs keeps running, and is told as it is.

    `past`: the group as status knows it, where there is one.
    """
    message = clauses(fault.words, fault.reason.remedy)
    told: tuple[Notice, ...] = ()
    status, known = old, {kind: _kept(old, kind) for kind in ConditionType}
    if past is not None and any(record.pod_uid is not None for record in old.runners):
        situation = _watched(past)
        status, known = situation.status, dict(facts.all_of(situation))
        told = tuple(events.failures(old, situation))
    known[_C.READY] = Fact("False", fault.reason, message)
    known[_C.STALLED] = Fact("True", fault.reason, message)
    known[_C.RECONCILING] = Fact("False", fault.reason, "nothing goes on until the spec is corrected: see Stalled")
    status = finish(status, known, old, instance["metadata"].get("generation", 0), clock)
    step = events.so_far(old, status)
    notice = Notice("Warning", fault.reason, message, status.epoch, "Refuse", step)
    said = (notice,) if _flipped(old, fault.reason) else ()
    written = writes.worth_writing(old, status, clock)
    return Plan(written, events=(*told, *said) if written is status else (), requeue_at=clock.requeue_at)


def _watched(past: Picture) -> Situation:
    """What becomes of a group whose spec was refused: a failure is recorded, but nothing starts again."""
    status = failure.examine(past.recall(past.stored), past.stored)
    status = status.model_copy(update={"next_restart_at": None})
    status = runners.update(past.recall(status), status)
    return Situation(past.recall(status), status, None, halted=True)


def suspend(picture: Picture, status: Status, fault: Unusable | None) -> Plan:
    """`spec.suspend`: the pods drain and go; Service, Secret and history stay. Also where the spec has a fault."""
    old, wanted = picture.stored, picture.wanted
    message = "spec.suspend is true: pods are removed; Service and history are kept; set it to false to start again"
    if fault is not None:
        message = clauses(message, f"but first correct the spec: {fault.words}")
    halted = Fact("False", Reason.SUSPENDED, message)
    known = {
        _C.READY: halted,
        _C.RECONCILING: Fact("False", Reason.SUSPENDED, "suspended: there is nothing to do"),
        _C.STALLED: Fact("False", Reason.SUSPENDED, "suspended: nothing is in the way"),
        _C.SCHEDULED: Fact("False", Reason.SUSPENDED, "suspended: there are no pods"),
        _C.MODEL_AVAILABLE: _kept(old, _C.MODEL_AVAILABLE),
        _C.CONNECTED: Fact("False", Reason.SUSPENDED, "suspended: there is no group"),
        _C.LOADED: Fact("False", Reason.SUSPENDED, "suspended: nothing is loaded"),
        _C.RUNNER_FAILED: _kept(old, _C.RUNNER_FAILED),
    }
    if (left := departures.unneeded(picture, picture.pods)) is not None:
        known[_C.RECONCILING] = Fact("True", left.reason, left.message)
        known[_C.SCHEDULED] = Fact("False", Reason.SUSPENDED, "suspended: a pod does not go")
        if left.stalled:
            known[_C.RECONCILING] = Fact("False", left.reason, "nothing goes on until somebody acts: see Stalled")
            known[_C.STALLED] = Fact("True", left.reason, left.message)
    if wanted.world_size == 1:
        known[_C.CONNECTED] = Fact("True", Reason.SINGLE_RUNNER, "one runner: there is no group to form")
    status = status.model_copy(
        update={
            "endpoint": wanted.endpoint,
            "next_restart_at": None,
            "ready_runners": 0,
            "runners_ready": f"0/{wanted.world_size}",
            "model": old.model or ModelStatus(source=wanted.spec.model.source),
            "runners": tuple(_asleep(picture, rank) for rank in picture.ranks),
            # A restart that was asked for meanwhile is due with the resumption.
            "observed_retry": wanted.retry,
        }
    )
    status = finish(status, known, old, wanted.generation, picture.clock)
    told = (Notice("Normal", Reason.SUSPENDED, message, old.epoch, "RemovePods", Step.OVER),)
    notices = told if _flipped(old, Reason.SUSPENDED) else ()
    return Plan(status, children.remove(picture), notices, picture.clock.requeue_at)


def _asleep(picture: Picture, rank: Rank) -> RunnerStatus:
    record = rank.record
    same = record.state is RunnerState.PENDING
    return record.model_copy(
        update={
            "pod": names.pod_name(picture.wanted.name, rank.rank),
            "pod_uid": None,
            "incarnation": None,
            "node": None,
            "state": RunnerState.PENDING,
            "since": record.since if same and record.since is not None else picture.clock.stamp,
            "layers": None,
            "note": None,
            "progress": None,
        }
    )


def _kept(old: Status, kind: ConditionType) -> Fact:
    known = old.condition(kind)
    if known is None:
        return Fact("Unknown", Reason.UNKNOWN, "nothing was observed yet")
    return Fact(known.status, known.reason, known.message)


def _flipped(old: Status, reason: Reason) -> bool:
    ready = old.condition(_C.READY)
    return ready is None or ready.reason is not reason
