"""Epochs: when a new one is due, and when it is given to the pods."""

from datetime import timedelta

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.deadlines import OPERATOR_GRACE_SECONDS
from mlx_operator_api.runner import ENDED, RunnerState
from mlx_operator_api.status import AdapterStatus, GroupFailure, ModelStatus, RunnerStatus, Status

from . import restart, template
from .failure import pending
from .picture import Picture, Rank, asleep, assigned
from .spec import Wanted

SETTLE_SECONDS = 5.0
"""After a failure: how long the other engines have to end before CreateRunner kills them."""


TELL_SECONDS = 3.0
"""How much later than a container's successor its kubelet may tell how the container ended."""


def begin(picture: Picture, status: Status) -> tuple[Status, Reason | None]:
    """Open a new epoch where spec, annotations or the runners ask for one; also says why (None: no new epoch)."""
    status = _settled_image(picture, status)
    why = _why(picture, status)
    status = status.revised(
        spec_hash=picture.wanted.spec_hash,
        template_hash=template.template_hash(picture.wanted, status.runner_image or "", picture.settings),
        observed_retry=picture.wanted.retry,
        observed_restart=picture.wanted.restart,
        endpoint=picture.wanted.endpoint,
        model=_model(picture, status, why),
        runners=_runners(picture, status),
    )
    if why is None:
        return status, None
    fresh = {} if why is Reason.RESTART_REQUESTED else {"restarts": 0}
    update = {"epoch": following(picture, status), "next_restart_at": None, **fresh}
    return status.model_copy(update=update), why


def due(picture: Picture, status: Status) -> Reason | None:
    """Why a new epoch has to be opened (None: it has not)."""
    return _why(picture, _settled_image(picture, status))


def following(picture: Picture, status: Status) -> int:
    """The next epoch: above everything that status or any runner knows of."""
    return max([status.epoch, *(rank.report.epoch for rank in picture.ranks if rank.report)]) + 1


def _settled_image(picture: Picture, status: Status) -> Status:
    fixed = None if _restart_asked(picture, status) else status.runner_image
    image = template.image(picture.wanted, picture.settings, fixed, status.template_hash)
    return status.revised(runner_image=image)


def _why(picture: Picture, status: Status) -> Reason | None:
    wanted, old = picture.wanted, picture.stored
    ready = old.condition(ConditionType.READY)
    if status.epoch == 0:
        return Reason.EPOCH_STARTED
    if asleep(status) or (ready is not None and ready.reason is Reason.SUSPENDED):
        return Reason.SPEC_CHANGED
    hashed = template.template_hash(wanted, status.runner_image or "", picture.settings)
    changed = wanted.spec_hash != status.spec_hash or hashed != status.template_hash
    started = assigned(status) or restart.open_failure(status) is not None
    if _restart_asked(picture, status):
        return Reason.RESTART_REQUESTED
    if (changed and started) or restart.budget_raised(status, wanted.restarts):
        return Reason.SPEC_CHANGED
    if _new(wanted.retry, status.observed_retry) and _troubled(status):
        return Reason.RETRY_REQUESTED
    return Reason.EPOCH_STARTED if _overtaken(picture, status) else None


def _restart_asked(picture: Picture, status: Status) -> bool:
    """By the annotation; whatever else makes a new epoch due, it is to be one with image and model anew."""
    return _new(picture.wanted.restart, status.observed_restart) and status.epoch > 0


def _new(wanted: str | None, observed: str | None) -> bool:
    return wanted is not None and wanted != observed


def _troubled(status: Status) -> bool:
    stalled = status.condition(ConditionType.STALLED)
    is_stalled = stalled is not None and stalled.status == "True"
    return is_stalled or restart.open_failure(status) is not None or pending(status) is not None


def _overtaken(picture: Picture, status: Status) -> bool:
    """A runner is of an epoch that status does not know: status was restored from somewhere."""
    limit = status.epoch if assigned(status) else status.epoch - 1
    return any(rank.report is not None and rank.report.epoch > limit for rank in picture.ranks)


def _model(picture: Picture, status: Status, why: Reason | None) -> ModelStatus:
    """The model as resolved; a hub's branch is looked up again only where the user asked for something new.

    A failure, another pod template or a rolled key must not change what is served.
    """
    wanted, known = picture.wanted, status.model
    fresh = _unresolved(wanted)
    if known is None or known.source != fresh.source:
        return fresh
    asked = _restart_asked(picture, status) or (why is Reason.RETRY_REQUESTED and known.digest is None)
    asked |= why is Reason.SPEC_CHANGED and wanted.spec_hash != status.spec_hash
    if asked and wanted.from_hub:
        return fresh
    return known if known.sources == fresh.sources else known.model_copy(update={"adapter": fresh.adapter})


def _unresolved(wanted: Wanted) -> ModelStatus:
    """What the spec names, before any runner looked at it."""
    adapter = wanted.runner.adapter
    return ModelStatus(source=wanted.runner.source, adapter=AdapterStatus(source=adapter) if adapter else None)


def _runners(picture: Picture, status: Status) -> tuple[RunnerStatus, ...]:
    return tuple(status.runner(rank.rank) for rank in picture.ranks)


def start(picture: Picture, status: Status) -> Status:
    """Give the epoch to the pods, all at once, when every supervisor can take it.

    The record of pod and incarnation is written before the first CreateRunner is sent: another pod or process never
    gets a runner of the same epoch, so no epoch runs two engines of one rank.
    """
    clock = picture.clock
    if assigned(status):
        # It runs, or it failed for good: a failure that may be tried again has opened another epoch.
        return status
    if status.next_restart_at is not None and not clock.passed(status.next_restart_at):
        return status
    if not all(_can_start(rank, status) for rank in picture.ranks) or not _settled(picture, status):
        return status
    if not all(rank.heard_lately(clock.now) for rank in picture.ranks):
        clock.wakes.append(clock.now + timedelta(seconds=1))
        return status
    if picture.stored.epoch != status.epoch:
        # First the failure, or the reason for a new epoch, stands where everybody can read it.
        clock.wakes.append(clock.now)
        return status
    return status.model_copy(
        update={
            "next_restart_at": None,
            "runners": tuple(_joined(picture, rank, status) for rank in picture.ranks),
        }
    )


def _can_start(rank: Rank, status: Status) -> bool:
    if not rank.reachable or rank.report is None or rank.pod is None:
        return False
    return rank.pod.template_hash == status.template_hash and not rank.report.draining and not rank.node_lost


def _joined(picture: Picture, rank: Rank, status: Status) -> RunnerStatus:
    pod, report = rank.pod, rank.report
    return status.runner(rank.rank).model_copy(
        update={
            "pod": pod.name if pod else None,
            "pod_uid": pod.uid if pod else None,
            "node": pod.node if pod else None,
            "incarnation": report.incarnation if report else None,
            "memory_limit_bytes": report.memory_limit_bytes if report else None,
            "epoch": status.epoch,
            "state": RunnerState.PENDING,
            "since": picture.clock.stamp,
            "layers": None,
            "note": None,
            "progress": None,
        }
    )


def survivors(picture: Picture, status: Status) -> tuple[Rank, ...]:
    """Ranks whose engine belongs to an epoch that is over, and still runs."""
    over = restart.open_failure(status)
    last = over.epoch if over is not None else status.epoch - 1
    return tuple(
        rank
        for rank in picture.ranks
        if rank.alive
        and rank.report is not None
        and 0 < rank.report.epoch <= last
        and rank.report.state not in ENDED
        and rank.report.state is not RunnerState.PENDING
    )


def draining(picture: Picture, status: Status) -> bool:
    """A pod of a healthy group is being deleted or evicted, and its engine still serves: requests may finish.

    Nothing is delayed by it: the group cannot start again before that pod is gone.
    """
    failure = restart.open_failure(status)
    if failure is None or failure.reason not in (Reason.POD_DELETED, Reason.EVICTED):
        return False
    reports = {rank.rank: rank.in_epoch(failure.epoch) for rank in picture.ranks if rank.alive and rank.pod is not None}
    if len(reports) < len(picture.ranks) or any(r is None or r.state is RunnerState.FAILED for r in reports.values()):
        return False
    going = next((rank for rank in picture.ranks if rank.rank == failure.rank), None)
    report = reports.get(failure.rank) if failure.rank is not None else None
    if going is None or going.pod is None or report is None or report.state in ENDED:
        return False
    return (going.pod.deleting or going.pod.disruption != "") and not going.pod.over


def _untold(status: Status, failure: GroupFailure) -> bool:
    """A container ended, and its kubelet has not said how: its word would come too late for the cause of the epoch."""
    own = status.runner(failure.rank).last_failure if failure.rank is not None else None
    return failure.reason is Reason.CONTAINER_CRASHED and (own is None or own.exit_code is None)


def _settled(picture: Picture, status: Status) -> bool:
    """The other engines of a failed epoch have said their last word; those of a planned restart have drained.

    Both have their time: CreateRunner ends what is left.
    """
    failure = restart.open_failure(status)
    untold = failure is not None and _untold(status, failure)
    if failure is not None and untold and not picture.clock.passed(failure.time + timedelta(seconds=TELL_SECONDS)):
        return False
    if not survivors(picture, status):
        return True
    if failure is not None:
        return picture.clock.passed(failure.time + timedelta(seconds=SETTLE_SECONDS))
    # Ready is False since the epoch was opened, or longer: then there were no requests to finish.
    ready = picture.stored.condition(ConditionType.READY)
    if ready is None or ready.status == "True":
        return False
    limit = picture.wanted.deadline("shutdown") + timedelta(seconds=OPERATOR_GRACE_SECONDS)
    return picture.clock.passed(ready.last_transition_time + limit)
