"""When nothing is to be run: the spec cannot be used, or the instance is suspended."""

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import ModelStatus, RunnerStatus, Status

from . import children
from .actions import Notice, Plan
from .conditions import Fact
from .messages import clauses
from .observed import Manifest
from .picture import Clock, Picture, Rank
from .stored import finish

_C = ConditionType


def refuse(instance: Manifest, old: Status, reason: Reason, words: str, clock: Clock) -> Plan:
    """A spec that cannot be used: said, and nothing is changed. What runs keeps running."""
    message = clauses(words, reason.remedy)
    facts = {kind: _kept(old, kind) for kind in ConditionType}
    facts[_C.READY] = Fact("False", reason, message)
    facts[_C.STALLED] = Fact("True", reason, message)
    facts[_C.RECONCILING] = Fact("False", reason, "nothing goes on until the spec is corrected: see Stalled")
    status = finish(old, facts, old, instance["metadata"].get("generation", 0), clock)
    notices = (Notice("Warning", reason, message, status.epoch, "Refuse"),) if _flipped(old, reason) else ()
    return Plan(status, events=notices)


def suspend(picture: Picture, status: Status) -> Plan:
    """`spec.suspend`: the pods drain and go; Service, Secret and history stay."""
    old, wanted = picture.stored, picture.wanted
    message = "spec.suspend is true: pods are removed; Service and history are kept; set it to false to start again"
    halted = Fact("False", Reason.SUSPENDED, message)
    facts = {
        _C.READY: halted,
        _C.RECONCILING: Fact("False", Reason.SUSPENDED, "suspended: there is nothing to do"),
        _C.STALLED: Fact("False", Reason.SUSPENDED, "suspended: nothing is in the way"),
        _C.SCHEDULED: Fact("False", Reason.SUSPENDED, "suspended: there are no pods"),
        _C.MODEL_AVAILABLE: _kept(old, _C.MODEL_AVAILABLE),
        _C.CONNECTED: Fact("False", Reason.SUSPENDED, "suspended: there is no group"),
        _C.LOADED: Fact("False", Reason.SUSPENDED, "suspended: nothing is loaded"),
        _C.RUNNER_FAILED: _kept(old, _C.RUNNER_FAILED),
    }
    if wanted.world_size == 1:
        facts[_C.CONNECTED] = Fact("True", Reason.SINGLE_RUNNER, "one runner: there is no group to form")
    status = status.model_copy(
        update={
            "endpoint": wanted.endpoint,
            "next_restart_at": None,
            "ready_runners": 0,
            "runners_ready": f"0/{wanted.world_size}",
            "model": old.model or ModelStatus(source=wanted.spec.model.source),
            "runners": tuple(_asleep(picture, rank) for rank in picture.ranks),
            "observed_retry": wanted.retry,
            "observed_restart": wanted.restart,
        }
    )
    status = finish(status, facts, old, wanted.generation, picture.clock)
    told = (Notice("Normal", Reason.SUSPENDED, message, old.epoch, "RemovePods"),)
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
