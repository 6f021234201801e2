"""`status.runners`: every rank's pod, node, state and progress. States never go back within an epoch."""

from datetime import timedelta

from mlx_operator_api import names
from mlx_operator_api.runner import ENDED, ORDER, RunnerState
from mlx_operator_api.status import ModelStatus, RunnerStatus, Status

from . import downloads, progress, restart
from .picture import Picture, Rank, effective


def update(picture: Picture, status: Status) -> Status:
    """Bring every rank's entry, and what they sum up to, to what was observed."""
    runners = tuple(_entry(picture, rank, status) for rank in picture.ranks)
    ready = sum(r.epoch == status.epoch and r.state is RunnerState.READY for r in runners)
    return status.revised(
        runners=runners,
        ready_runners=ready,
        runners_ready=f"{ready}/{len(runners)}",
        model=_model(picture, status),
    )


def _entry(picture: Picture, rank: Rank, status: Status) -> RunnerStatus:
    record, pod = rank.record, rank.pod
    state = _state(rank, status)
    same = state is record.state
    since = record.since if same and record.since is not None else picture.clock.stamp
    report = rank.in_epoch(record.epoch)
    shown = record.progress if same or state in ENDED else None
    if report is not None and record.epoch > 0:
        age = picture.clock.now - since if same else timedelta()
        shown = progress.text(report, age, from_hub=picture.wanted.from_hub)
    return record.revised(
        pod=names.pod_name(picture.wanted.name, rank.rank),
        node=pod.node if pod is not None and pod.node else record.node,
        state=state,
        since=since,
        layers=(report.layers if report is not None else None) or record.layers,
        note=(report.note if report is not None else None) or record.note,
        progress=shown,
    )


def _state(rank: Rank, status: Status) -> RunnerState:
    """What its report says; what is recorded until there is one; Pending where neither holds any more."""
    record = rank.record
    if record.epoch == 0:
        return RunnerState.PENDING
    seen = effective(rank, record.epoch)
    if ORDER[seen] < ORDER[record.state]:
        seen = record.state
    moved = rank.pod is None or rank.pod.uid != record.pod_uid
    over = record.epoch < status.epoch
    return RunnerState.PENDING if over and moved and seen not in ENDED else seen


def _model(picture: Picture, status: Status) -> ModelStatus | None:
    """What the runners found at the source. The commits of a hub's repositories stay as they were found first."""
    if status.model is None:
        return None
    adapter = status.model.adapter
    if adapter is not None:
        adapter = adapter.model_copy(update={"revision": downloads.adapter_commit(picture, status)})
    failure = restart.open_failure(status)
    epoch = status.epoch if failure is None else failure.epoch
    reports = (rank.in_epoch(epoch) for rank in picture.ranks)
    whole = next((r.model for r in reports if r is not None and r.model is not None and r.model.digest), None)
    found = {} if whole is None else {"digest": whole.digest, "bytes": whole.bytes or None}
    commit = downloads.commit(picture, status)
    return status.model.revised(revision=commit, adapter=adapter, **found)
