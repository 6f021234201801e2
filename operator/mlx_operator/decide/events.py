"""Events: from the change of the status, so that each is told once, by whichever operator made the change."""

from collections.abc import Iterator

from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.status import Status

from .actions import Notice
from .facts import Situation, failure_message
from .messages import count
from .picture import Picture, assigned

_MILESTONES = (ConditionType.LOADED, ConditionType.READY)
"""That the steps before them were reached follows from these; what each found stands in its condition."""
_REQUESTED = (Reason.SPEC_CHANGED, Reason.RESTART_REQUESTED, Reason.RETRY_REQUESTED)


def tell(old: Status, situation: Situation, opened: Reason | None) -> tuple[Notice, ...]:
    """What changed from the stored status to the new one. `opened`: why this plan opened a new epoch."""
    new, picture = situation.status, situation.picture
    return (
        *_epoch(old, new, picture, opened),
        *failures(old, situation),
        *_problems(old, new, situation),
        *_milestones(old, new),
    )


def _epoch(old: Status, new: Status, picture: Picture, opened: Reason | None) -> Iterator[Notice]:
    if opened in _REQUESTED and opened is not None:
        yield Notice("Normal", opened, f"epoch {new.epoch} is due: {opened.meaning}", new.epoch, "StartEpoch")
    if old.template_hash != new.template_hash and not picture.wanted.suspended:
        pods = count(picture.wanted.world_size, "pod")
        yield Notice(
            "Normal", Reason.PODS_CREATED, f"creating {pods} with image {new.runner_image}", new.epoch, "Create"
        )
    if assigned(new) and not (assigned(old) and old.epoch == new.epoch):
        note = f"epoch {new.epoch} started in {count(picture.wanted.world_size, 'pod')}"
        yield Notice("Normal", Reason.EPOCH_STARTED, note, new.epoch, "StartEpoch")


def failures(old: Status, situation: Situation) -> Iterator[Notice]:
    """A new failure of the group, a better cause of it, and rejected tasks."""
    new = situation.status
    reason = _cause_told(old, new)
    if reason is not None:
        last = new.history[0]
        record = new.runner(last.rank) if last.rank is not None else None
        related = (record.pod, record.pod_uid) if record and record.pod and record.pod_uid else None
        yield Notice("Warning", reason, failure_message(situation), last.epoch, "RestartGroup", related, last.rank)
    for record in new.runners:
        failure, known = record.last_failure, old.runner(record.rank).last_failure
        if failure is not None and failure.reason is Reason.TASK_REJECTED and failure != known:
            related = (record.pod, record.pod_uid) if record.pod and record.pod_uid else None
            yield Notice(
                "Warning", Reason.TASK_REJECTED, failure.message, failure.epoch, "RejectTask", related, record.rank
            )


def _cause_told(old: Status, new: Status) -> Reason | None:
    """The reason of the Event that a failure needs: one for each, and another one where a better cause replaces it.

    An Event's note cannot be changed, so the better cause has its own, named after it.
    """
    if not new.history or (old.history and new.history == old.history):
        return None
    if not old.history or old.history[0].epoch != new.history[0].epoch:
        return Reason.RUNNER_FAILED
    before, now = old.history[0], new.history[0]
    return now.reason if (before.reason, before.rank) != (now.reason, now.rank) else None


def _problems(old: Status, new: Status, situation: Situation) -> Iterator[Notice]:
    ready, before = new.condition(ConditionType.READY), old.condition(ConditionType.READY)
    if ready is None or ready.status == "True":
        return
    failed = situation.failure is not None and ready.reason is situation.failure.reason
    if ready.reason.retry is Retry.NONE or failed or (before is not None and before.reason is ready.reason):
        return
    rank = situation.problem.rank if situation.problem is not None else None
    pod = situation.picture.ranks[rank].pod if rank is not None else None
    related = (pod.name, pod.uid) if pod is not None else None
    yield Notice("Warning", ready.reason, ready.message, new.epoch, "Wait", related, rank)


def _milestones(old: Status, new: Status) -> Iterator[Notice]:
    for kind in _MILESTONES:
        now, before = new.condition(kind), old.condition(kind)
        if now is None or now.status != "True" or (before is not None and before.status == "True"):
            continue
        yield Notice("Normal", now.reason, now.message, new.epoch, str(kind))
