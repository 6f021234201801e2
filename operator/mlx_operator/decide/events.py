"""Events: from the change of the status, so that each is told once, by whichever operator made the change."""

from collections.abc import Iterator

from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import ENDED, ORDER, RunnerState
from mlx_operator_api.status import RunnerStatus, Status

from . import restart
from .actions import Notice, Step
from .facts import Situation, failure_message, shards
from .messages import count
from .picture import Picture, assigned

_REQUESTED = (Reason.SPEC_CHANGED, Reason.RESTART_REQUESTED, Reason.RETRY_REQUESTED)


def tell(old: Status, situation: Situation, opened: Reason | None) -> tuple[Notice, ...]:
    """What changed from the stored status to the new one, in the order in which it happened.

    Loaded and Ready are told of every epoch that got there: that the steps before them were reached follows from these.
    `opened`: why this plan opened a new epoch.
    """
    new, picture = situation.status, situation.picture
    return (
        *_epoch(old, new, picture, opened),
        *_loaded(old, new),
        *failures(old, situation),
        *_problems(old, new, situation),
        *_ready(old, new),
    )


def so_far(old: Status, new: Status) -> Step:
    """How far the story of the epoch is, for what is told at no step of its own."""
    if restart.final_failure(new) is not None:
        return Step.OVER
    if not assigned(new):
        return Step.WAITING
    if _served(old):
        return Step.SERVING
    return Step.WARMING_UP if _holds_shards(new) else Step.STARTING


def _served(status: Status) -> bool:
    """Whether the epoch was Ready, and still is but for what came in the way: then Ready ended after its ranks' way.

    Or in the same second, of which status knows no parts; that the whole way took less than that is not to be expected.
    """
    ready = status.condition(ConditionType.READY)
    if ready is None or ready.status == "True":
        return ready is not None
    times = [record.since for record in status.runners if record.state is RunnerState.READY and record.since]
    return len(times) == len(status.runners) > 0 and ready.last_transition_time >= max(times)


def _epoch(old: Status, new: Status, picture: Picture, opened: Reason | None) -> Iterator[Notice]:
    if opened in _REQUESTED and opened is not None:
        note = f"epoch {new.epoch} is due: {opened.meaning}"
        yield Notice("Normal", opened, note, new.epoch, "StartEpoch", Step.ASKED)
    if old.template_hash != new.template_hash and not picture.wanted.suspended:
        pods = count(picture.wanted.world_size, "pod")
        note = f"creating {pods} with image {new.runner_image}"
        yield Notice("Normal", Reason.PODS_CREATED, note, new.epoch, "Create", Step.CREATED)
    if assigned(new) and not (assigned(old) and old.epoch == new.epoch):
        note = f"epoch {new.epoch} started in {count(picture.wanted.world_size, 'pod')}"
        yield Notice("Normal", Reason.EPOCH_STARTED, note, new.epoch, "StartEpoch", Step.STARTED)


def failures(old: Status, situation: Situation) -> Iterator[Notice]:
    """A new failure of the group, a better cause of it, and rejected tasks."""
    new = situation.status
    reason = _cause_told(old, new)
    if reason is not None:
        last = new.history[0]
        record = new.runner(last.rank) if last.rank is not None else None
        related = (record.pod, record.pod_uid) if record and record.pod and record.pod_uid else None
        note, action = failure_message(situation), "RestartGroup"
        yield Notice("Warning", reason, note, last.epoch, action, Step.FAILED, related, last.rank)
    for record in new.runners:
        failure, known = record.last_failure, old.runner(record.rank).last_failure
        if failure is not None and failure.reason is Reason.TASK_REJECTED and failure != known:
            related = (record.pod, record.pod_uid) if record.pod and record.pod_uid else None
            step = so_far(old, new) if failure.epoch == new.epoch else Step.FAILED
            note, action, reason = failure.message, "RejectTask", Reason.TASK_REJECTED
            yield Notice("Warning", reason, note, failure.epoch, action, step, related, record.rank)


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
    yield Notice("Warning", ready.reason, ready.message, new.epoch, "Wait", so_far(old, new), related, rank)


def _loaded(old: Status, new: Status) -> Iterator[Notice]:
    """Also of an epoch whose failure is written first: whether a write fell between does not change the story."""
    if _holds_shards(new) and not _holds_shards(old):
        yield Notice("Normal", Reason.MODEL_LOADED, shards(new), _newest(new), ConditionType.LOADED, Step.LOADED)


def _holds_shards(status: Status) -> bool:
    """Whether every rank of the newest epoch that was started came to hold its shard, as its entries show.

    No rank warms up before all of them do.
    """
    states = [_furthest(record) for record in status.runners if record.epoch == _newest(status)]
    if not status.runners or _newest(status) == 0 or len(states) < len(status.runners):
        return False
    warm = any(state is not None and ORDER[state] >= ORDER[RunnerState.WARMING_UP] for state in states)
    known = [state for state in states if state is not None]
    return warm or (bool(known) and all(ORDER[state] >= ORDER[RunnerState.LOADED] for state in known))


def _newest(status: Status) -> int:
    return max((record.epoch for record in status.runners), default=0)


def _furthest(record: RunnerStatus) -> RunnerState | None:
    """The state that a rank was in, before it ended; None: it was ended, and nothing tells how far it was."""
    if record.state not in ENDED:
        return record.state
    failure = record.last_failure
    return failure.state if failure is not None and failure.epoch == record.epoch else None


def _ready(old: Status, new: Status) -> Iterator[Notice]:
    now, before = new.condition(ConditionType.READY), old.condition(ConditionType.READY)
    if now is not None and now.status == "True" and (before is None or before.status != "True"):
        yield Notice("Normal", now.reason, now.message, new.epoch, ConditionType.READY, Step.READY)
