"""What the runners are told: create, download, connect, load, warm up; and the end of engines whose epoch is over.

A task goes out as long as the runner's report does not show it: sent again it is answered, never run twice. None goes
out that the transition table would reject.
"""

from collections.abc import Iterator
from datetime import timedelta

from mlx_operator_api import names
from mlx_operator_api.runner import ENDED, ORDER, RunnerState, Standing, judge
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import (
    PROTOCOL,
    ConnectToGroup,
    CreateRunner,
    GroupCause,
    LoadModel,
    Peer,
    Sharding,
    Shutdown,
    StartWarmup,
    Task,
    TaskPhase,
    TaskRequest,
)

from . import downloads, restart
from .actions import SendTask
from .epoch import draining, survivors
from .failure import pending
from .picture import Picture, Rank, assigned, effective

RESEND_SECONDS = 2.0
_CONNECTED, _LOADED = ORDER[RunnerState.CONNECTED], ORDER[RunnerState.LOADED]


def send(picture: Picture, status: Status) -> tuple[SendTask, ...]:
    """All tasks that are due."""
    sent = tuple(_endings(picture, status))
    if assigned(status) and restart.open_failure(status) is None and pending(status) is None:
        sent += tuple(_steps(picture, status))
    if sent:
        picture.clock.wakes.append(picture.clock.now + timedelta(seconds=RESEND_SECONDS))
    return sent


def _endings(picture: Picture, status: Status) -> Iterator[SendTask]:
    """Shutdown for engines of an epoch that is over; an end in good order lets rank 0 finish its requests first.

    Where nothing starts again by itself, rank 0 hears of it also when its engine has ended: it holds clients.
    """
    final = restart.final_failure(status) is not None
    remaining = survivors(picture, status)
    orderly = restart.open_failure(status) is None or draining(picture, status)
    drain = orderly and any(rank.rank == 0 for rank in remaining)
    for rank in remaining:
        if drain and (rank.rank != 0 or (rank.report is not None and rank.report.draining)):
            # A pod that is being deleted drains by itself.
            continue
        grace = picture.wanted.deadlines.of("shutdown") if drain else 0.0
        if rank.report is not None and rank.report.state is not RunnerState.SHUTTING_DOWN:
            yield from _to(picture, rank, rank.report.epoch, Shutdown(grace_seconds=grace, final=final))
    first = picture.ranks[0]
    report = first.in_epoch(status.epoch) if final and first.alive else None
    if report is not None and report.state in ENDED:
        yield from _to(picture, first, status.epoch, Shutdown(final=True))


def _steps(picture: Picture, status: Status) -> Iterator[SendTask]:
    for rank in picture.ranks:
        if not rank.reachable or rank.report is None or rank.record.epoch != status.epoch:
            continue
        if rank.report.incarnation != rank.record.incarnation:
            continue
        if rank.report.epoch < status.epoch:
            yield from _to(picture, rank, status.epoch, _create(picture, status))
            continue
        yield from _next(picture, rank, status)


def _create(picture: Picture, status: Status) -> CreateRunner:
    """The same for all ranks, whenever it is sent: what the layers are split by was recorded with the epoch."""
    limits = tuple(record.memory_limit_bytes for record in status.runners)
    return picture.wanted.runner.model_copy(update={"memory_limits": limits, "cause": _cause(status)})


def _cause(status: Status) -> GroupCause | None:
    """Why the last epoch failed, if it did."""
    last = status.history[0] if status.history else None
    if last is None or last.rank is None:
        return None
    known = status.runner(last.rank).last_failure
    signal = known.signal if known is not None and known.epoch == last.epoch else None
    return GroupCause(epoch=last.epoch, rank=last.rank, reason=last.reason, signal=signal)


def _next(picture: Picture, rank: Rank, status: Status) -> Iterator[SendTask]:
    epoch = status.epoch
    report = rank.in_epoch(epoch)
    if report is None:
        return
    match report.state:
        case RunnerState.IDLE if not report.model_available:
            attempt, download = downloads.attempt(rank, picture.clock), downloads.task(picture, rank, status)
            if attempt is not None and download is not None:
                yield from _to(picture, rank, epoch, download, attempt)
        case RunnerState.IDLE if picture.wanted.world_size > 1:
            if _may_connect(picture, rank, epoch) and (peers := _peers(picture)) is not None:
                yield from _to(picture, rank, epoch, ConnectToGroup(peers=peers))
        case RunnerState.IDLE | RunnerState.CONNECTED:
            if picture.wanted.world_size == 1 or _all_at_least(picture, epoch, _CONNECTED):
                yield from _to(picture, rank, epoch, LoadModel())
        case RunnerState.LOADED:
            if _may_warm_up(picture, rank, epoch):
                yield from _to(picture, rank, epoch, StartWarmup())
        case _:
            pass


def _may_connect(picture: Picture, rank: Rank, epoch: int) -> bool:
    """Every rank can follow; for the MLX ring, the last rank dials only what listens already."""
    if not all(downloads.available(other, epoch, picture.stored) for other in picture.ranks):
        return False
    last = picture.wanted.world_size - 1
    if picture.wanted.runner.sharding is not Sharding.TENSOR or rank.rank != last:
        return True
    return all(_listens(other, epoch) for other in picture.ranks if other.rank != last)


def _listens(rank: Rank, epoch: int) -> bool:
    report = rank.in_epoch(epoch)
    return report is not None and (report.ring_listening or ORDER[report.state] >= _CONNECTED)


def _peers(picture: Picture) -> tuple[Peer, ...] | None:
    peers = []
    for rank in picture.ranks:
        if rank.pod is None or rank.pod.ip is None:
            return None
        peers.append(Peer(rank=rank.rank, pod_ip=rank.pod.ip, port=names.FRAME_PORT))
    return tuple(peers)


def _all_at_least(picture: Picture, epoch: int, order: int) -> bool:
    return all(order <= ORDER[effective(rank, epoch)] <= ORDER[RunnerState.RUNNING] for rank in picture.ranks)


def _may_warm_up(picture: Picture, rank: Rank, epoch: int) -> bool:
    """Workers when all are loaded; rank 0, which drives the first passes, when all workers wait for it."""
    if rank.rank != 0:
        return _all_at_least(picture, epoch, _LOADED)
    waiting = ORDER[RunnerState.WARMING_UP]
    return all(
        waiting <= ORDER[effective(other, epoch)] <= ORDER[RunnerState.RUNNING]
        for other in picture.ranks
        if other.rank != 0
    )


def _to(picture: Picture, rank: Rank, epoch: int, task: Task, attempt: int = 1) -> Iterator[SendTask]:
    """The task, unless its report shows it already or the table would reject it."""
    report, pod = rank.report, rank.pod
    if report is None or pod is None or pod.ip is None:
        return
    known = rank.outcome(task.name) if report.epoch == epoch else None
    if known is not None and known.phase is not TaskPhase.REJECTED and known.attempt >= attempt:
        return
    if judge(task.name, epoch, standing(rank)) is not None:
        return
    yield SendTask(
        pod=pod.name,
        pod_uid=pod.uid,
        pod_ip=pod.ip,
        request=TaskRequest(
            # Its own protocol or the one before: what is said is what the supervisor understands.
            protocol=min(PROTOCOL, max(report.protocol, PROTOCOL - 1)),
            instance_uid=picture.wanted.uid,
            epoch=epoch,
            rank=rank.rank,
            attempt=attempt,
            lease_transitions=picture.settings.lease_transitions,
            task=task,
        ),
    )


def standing(rank: Rank) -> Standing:
    """What the supervisor decides by, as far as its report tells."""
    report = rank.report
    if report is None:
        return Standing(rank=rank.rank)
    return Standing(
        state=report.state,
        epoch=report.epoch,
        world_size=report.world_size,
        rank=rank.rank,
        group=report.group,
        model_available=report.model_available,
    )
