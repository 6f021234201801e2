"""The failure of an epoch: its evidence goes into status first, with one root cause and what comes next."""

from collections.abc import Sequence
from datetime import timedelta

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import MAX_HISTORY, GroupFailure, LastFailure, RunnerStatus, Status

from . import evidence, restart
from .evidence import Evidence
from .messages import one_line
from .picture import Picture, Rank, assigned, who

ACCUSED_SECONDS = 2.0
"""How long a known consequence waits for the word of the rank it accuses."""
SILENT_ACCUSED_SECONDS = 6.0
"""The same while that rank's supervisor is out of touch: nothing could start again before it is back anyway."""


def examine(picture: Picture, status: Status) -> Status:
    """Find failures of the current epoch, or better evidence about the last one, and put them into status."""
    known = restart.open_failure(status)
    if known is None and not assigned(status):
        return status
    epoch = status.epoch if known is None else known.epoch
    # Without a pod in its record, a rank was put to sleep: what became of its pod is no failure.
    members = [rank for rank in picture.ranks if rank.record.epoch == epoch and rank.record.pod_uid is not None]
    # A rank that was ended in good order did not fail, whatever becomes of its pod afterwards.
    suspects = [rank for rank in members if known is None or rank.record.state is not RunnerState.SHUTDOWN]
    found = [e for rank in suspects if (e := evidence.diagnose(rank, epoch, picture, ended_by_us=known is not None))]
    if not found:
        return status
    status = _note(picture, status, epoch, found, recorded=known is not None)
    if known is not None:
        return _improve(picture, status, known, found, members)
    cause = _root(picture, status, found)
    return status if cause is None else _record(picture, status, cause, found, members)


def unwritten(old: Status, new: Status) -> bool:
    """Whether a failure stands in the new status that the old one has not, or its cause is still looked for."""
    if new.history and (not old.history or old.history[0].epoch != new.history[0].epoch):
        return True
    return restart.open_failure(new) is None and pending(new) is not None


def pending(status: Status) -> LastFailure | None:
    """A failure of the current epoch whose cause is still being looked for."""
    failed = [
        record.last_failure
        for record in status.runners
        if record.epoch == status.epoch and record.state is RunnerState.FAILED and record.last_failure
    ]
    return min(failed, key=lambda failure: failure.time, default=None)


def _note(picture: Picture, status: Status, epoch: int, found: Sequence[Evidence], *, recorded: bool) -> Status:
    """Each failed rank's own `lastFailure`; one that is known stays unless the new evidence is stronger."""
    by_rank = {e.rank: e for e in found}
    return status.model_copy(
        update={"runners": tuple(_noted(picture, r, epoch, by_rank.get(r.rank), recorded) for r in status.runners)}
    )


def _noted(picture: Picture, record: RunnerStatus, epoch: int, found: Evidence | None, recorded: bool) -> RunnerStatus:
    if found is None or record.epoch != epoch:
        return record
    known = record.last_failure
    same = known is not None and known.epoch == epoch and record.state is RunnerState.FAILED
    # Once the failure of the group is recorded, a pod may be deleted because of it: that explains nothing.
    explained = known is not None and same and not recorded and evidence.explains(found, known)
    if known is not None and same:
        explained |= evidence.completes(found, known) or evidence.outranks(found.reason, known.reason)
    if known is not None and same and found.strength >= evidence.strength(known.reason) and not explained:
        return record
    failure = LastFailure(
        epoch=epoch,
        time=known.time if known is not None and same else picture.clock.stamp,
        state=found.state,
        reason=found.reason,
        message=_message(picture, found),
        exit_code=found.exit_code,
        signal=found.signal,
        diagnostics=found.diagnostics,
    )
    since = record.since if record.state is RunnerState.FAILED else picture.clock.stamp
    return record.model_copy(update={"state": RunnerState.FAILED, "since": since, "last_failure": failure})


def _message(picture: Picture, found: Evidence) -> str:
    record = picture.ranks[found.rank].record
    name = who(found.rank, picture.wanted.world_size, record.pod or "?", record.node)
    return one_line(f"{name}: {found.what}", 900)


def _root(picture: Picture, status: Status, found: Sequence[Evidence]) -> Evidence | None:
    """The cause: a rank whose own reason is not PeerLost, earliest first; PeerLost only after a wait."""
    best = evidence.nearest(found)
    if not best.weak:
        return best
    accused = next((rank for e in found for rank in picture.ranks if rank.rank == e.accused), None)
    patience = ACCUSED_SECONDS if accused is None or accused.heard_lately(picture.clock.now) else SILENT_ACCUSED_SECONDS
    noted = status.runner(best.rank).last_failure
    since = noted.time if noted is not None else picture.clock.stamp
    return best if picture.clock.passed(since + timedelta(seconds=patience)) else None


def _record(
    picture: Picture, status: Status, cause: Evidence, found: Sequence[Evidence], members: Sequence[Rank]
) -> Status:
    rules = picture.wanted.restarts
    seed = f"{picture.wanted.uid}/{status.epoch}"
    free = restart.free_of_late(status.history, rules, picture.clock.now)
    verdict = restart.decide(cause.reason, status.restarts, rules, seed, picture.clock, free)
    failure = GroupFailure(
        epoch=status.epoch,
        time=picture.clock.stamp,
        reason=cause.reason,
        rank=cause.rank,
        message=_message(picture, cause),
        consequences=_consequences(cause, found, members),
    )
    return status.model_copy(
        update={
            "history": (failure, *status.history)[:MAX_HISTORY],
            "restarts": verdict.restarts,
            "next_restart_at": verdict.at,
            "epoch": status.epoch if verdict.at is None else _after(picture, status.epoch),
        }
    )


def _after(picture: Picture, epoch: int) -> int:
    return max([epoch, *(rank.report.epoch for rank in picture.ranks if rank.report)]) + 1


def _consequences(cause: Evidence, found: Sequence[Evidence], members: Sequence[Rank]) -> tuple[int, ...]:
    """The ranks that it took along: all but those with a reason of their own."""
    own = {e.rank for e in found if not e.weak} | {cause.rank}
    return tuple(rank.rank for rank in members if rank.rank not in own)


def _improve(
    picture: Picture, status: Status, known: GroupFailure, found: Sequence[Evidence], members: Sequence[Rank]
) -> Status:
    """Better evidence replaces the cause; what was decided from the old one is decided again."""
    best = evidence.nearest(found)
    if not evidence.better(best, known.reason, known.rank, found):
        return _complete(status, known, found)
    failure = known.model_copy(
        update={
            "reason": best.reason,
            "rank": best.rank,
            "message": _message(picture, best),
            "consequences": _consequences(best, found, members),
        }
    )
    status = status.model_copy(update={"history": (failure, *status.history[1:])})
    return _decide_again(picture, status, known.reason, best.reason)


def _complete(status: Status, known: GroupFailure, found: Sequence[Evidence]) -> Status:
    """The cause stays; how exactly its rank ended, and which others have a reason of their own, may be known by now."""
    own = status.runner(known.rank).last_failure if known.rank is not None else None
    told = own is not None and (own.epoch, own.reason) == (known.epoch, known.reason) and own.exit_code is not None
    # A container that ended by itself did not end because of the others: what is ordered ends engines.
    others = {e.rank for e in found if e.specific or e.exit_code is not None}
    failure = known.model_copy(
        update={
            "message": own.message if own is not None and told else known.message,
            "consequences": tuple(rank for rank in known.consequences if rank not in others),
        }
    )
    return status.model_copy(update={"history": (failure, *status.history[1:])})


def _decide_again(picture: Picture, status: Status, old: Reason, new: Reason) -> Status:
    scheduled = status.history[0].epoch < status.epoch
    if restart.counts(old) == restart.counts(new) and new.retry is old.retry:
        return status
    spent = status.restarts - (1 if restart.counts(old) and scheduled else 0)
    seed = f"{picture.wanted.uid}/{status.history[0].epoch}"
    rules = picture.wanted.restarts
    free = restart.free_of_late(status.history[1:], rules, picture.clock.now)
    verdict = restart.decide(new, max(0, spent), rules, seed, picture.clock, free)
    grown = status.epoch if scheduled or verdict.at is None else _after(picture, status.epoch)
    return status.model_copy(update={"restarts": verdict.restarts, "next_restart_at": verdict.at, "epoch": grown})
