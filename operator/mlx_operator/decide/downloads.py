"""The model's files: who has them, and when a failed download is tried again.

A failed download fails no runner: its rank stays Idle. Attempt k+1 is due 5 minutes times k after the first failure of
the epoch, so the times follow from what is recorded and a retry that fails the same way writes nothing.

All ranks use one commit of a hub's repository, of the model as of its adapter, wherever its branch moves meanwhile:
rank 0 resolves the revision and reports it, status keeps it, and the others are told. It stays over restarts;
`epoch.begin` forgets it where the user asked for something new.
"""

import re
from datetime import datetime, timedelta

from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import ENDED, ORDER, RunnerState, TaskName
from mlx_operator_api.source import Source, SourceKind
from mlx_operator_api.status import LastFailure, RunnerStatus, Status
from mlx_operator_api.tasks import DownloadModel, ModelFacts, Sharding, TaskOutcome, TaskPhase

from .messages import one_line
from .picture import Clock, Picture, Rank, who
from .spec import Wanted

RETRY_SECONDS = 300.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESOLVER = 0
"""The rank that finds out which commit the source's revision stands for."""


def available(rank: Rank, epoch: int, status: Status) -> bool:
    """Whether this rank has every file it needs."""
    if rank.record.epoch != epoch:
        return False
    report = rank.in_epoch(epoch)
    if report is not None:
        return report.model_available
    # Not heard by this process yet: as status has it.
    condition = status.condition(ConditionType.MODEL_AVAILABLE)
    known = condition is not None and condition.status == "True"
    return known or ORDER[_got_to(rank.record)] >= ORDER[RunnerState.CONNECTING]


def _got_to(record: RunnerStatus) -> RunnerState:
    """The state that a rank surely reached; how far one had come that was shut down is not recorded."""
    if record.state is RunnerState.FAILED and record.last_failure is not None:
        return record.last_failure.state
    return RunnerState.PENDING if record.state in ENDED else record.state


def failed(rank: Rank, epoch: int) -> TaskOutcome | None:
    """The outcome of a download that failed and left the rank Idle."""
    report = rank.in_epoch(epoch)
    if report is None or report.state is not RunnerState.IDLE or report.model_available:
        return None
    outcome = rank.outcome(TaskName.DOWNLOAD_MODEL)
    return outcome if outcome is not None and outcome.phase is TaskPhase.FAILED else None


def lasting(record: RunnerStatus) -> LastFailure | None:
    """The recorded failure of a download, through later attempts, until the rank gets beyond it."""
    noted = record.last_failure
    if noted is None or noted.epoch != record.epoch or record.state is not RunnerState.IDLE:
        return None
    return noted if noted.state is RunnerState.IDLE and noted.reason is not Reason.TASK_REJECTED else None


def commit(picture: Picture, status: Status) -> str | None:
    """The commit of the model that every rank uses. None: not known yet, or no hub's."""
    facts = _resolved(picture, status)
    kept = status.model.revision if status.model is not None else None
    return _commit(picture.wanted.source, kept, facts.revision if facts is not None else None)


def adapter_commit(picture: Picture, status: Status) -> str | None:
    """The same of the adapter."""
    facts = _resolved(picture, status)
    kept = status.model.adapter.revision if status.model is not None and status.model.adapter is not None else None
    return _commit(picture.wanted.adapter, kept, facts.adapter_revision if facts is not None else None)


def _resolved(picture: Picture, status: Status) -> ModelFacts | None:
    report = picture.ranks[_RESOLVER].in_epoch(status.epoch)
    return report.model if report is not None else None


def _commit(source: Source | None, kept: str | None, reported: str | None) -> str | None:
    """Named by the source, kept by status, or just reported."""
    if source is None or source.kind is not SourceKind.HUB:
        return None
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    return kept or reported


def task(picture: Picture, rank: Rank, status: Status) -> DownloadModel | None:
    """What a rank is told; None while something that it has to know is not known yet."""
    limits: tuple[int | None, ...] = ()
    if picture.wanted.world_size > 1 and picture.wanted.runner.sharding is Sharding.PIPELINE:
        reports = [other.in_epoch(status.epoch) for other in picture.ranks]
        if None in reports:
            return None
        # As CreateRunner told them: a rank fetches the layers that it will load.
        limits = tuple(status.runner(other.rank).memory_limit_bytes for other in picture.ranks)
    told = DownloadModel(
        revision=commit(picture, status), adapter_revision=adapter_commit(picture, status), memory_limits=limits
    )
    return told if rank.rank == _RESOLVER or _complete(picture.wanted, told) else None


def _complete(wanted: Wanted, told: DownloadModel) -> bool:
    """Whether nothing is left to resolve."""
    pairs = ((wanted.source, told.revision), (wanted.adapter, told.adapter_revision))
    return not any(s is not None and s.kind is SourceKind.HUB and revision is None for s, revision in pairs)


def latest_end(picture: Picture, rank: Rank, since: datetime) -> datetime:
    """When the attempt that runs must have ended, by its supervisor's own deadline, in the epoch that began `since`.

    Attempts follow each other: each has had its deadline and its wait, and so had those of the rank that resolved the
    revision before this one could begin.
    """
    ranks = {rank.rank, _RESOLVER} if picture.wanted.from_hub else {rank.rank}
    outcomes = (picture.ranks[number].outcome(TaskName.DOWNLOAD_MODEL) for number in ranks)
    attempts = sum(1 if outcome is None else outcome.attempt for outcome in outcomes)
    waits = timedelta(seconds=RETRY_SECONDS * (attempts - 1))
    return since + attempts * picture.wanted.deadline("download") + waits


def attempt(rank: Rank, clock: Clock) -> int | None:
    """The attempt that is due now: the first, one that was not acknowledged, or the next after a failure."""
    outcome = rank.outcome(TaskName.DOWNLOAD_MODEL)
    if outcome is None or outcome.phase is TaskPhase.REJECTED:
        return 1
    if outcome.phase is not TaskPhase.FAILED:
        return None
    if (outcome.reason or Reason.MODEL_UNREACHABLE).retry is Retry.NEVER:
        return None
    noted = rank.record.last_failure
    first = noted.time if noted is not None and noted.epoch == outcome.epoch else clock.stamp
    due = first + timedelta(seconds=RETRY_SECONDS * outcome.attempt)
    return outcome.attempt + 1 if clock.passed(due) else None


def note(picture: Picture, status: Status) -> Status:
    """Record failed downloads and rejected tasks as the last failure of their rank, once each."""
    runners = tuple(_noted(picture, record, status.epoch) for record in status.runners)
    return status.revised(runners=runners)


def _noted(picture: Picture, record: RunnerStatus, epoch: int) -> RunnerStatus:
    rank = picture.ranks[record.rank]
    report = rank.in_epoch(epoch)
    if report is None or record.epoch != epoch or record.state is RunnerState.FAILED:
        # What a failed rank still rejects came too late: it must not cover what the rank failed with.
        return record
    rejected = (t for t in report.tasks if t.phase is TaskPhase.REJECTED and t.epoch == epoch)
    outcome = failed(rank, epoch) or next(rejected, None)
    if outcome is None:
        return record
    if outcome.rejection is not None:
        reason, words = Reason.TASK_REJECTED, outcome.rejection.line()
    else:
        reason = outcome.reason or Reason.MODEL_UNREACHABLE
        words = f"{outcome.name} failed: {outcome.message or reason.meaning}"
    name = who(record.rank, picture.wanted.world_size, record.pod or "?", record.node)
    message = one_line(f"{name}: {words}", 900)
    known = record.last_failure
    again = known is not None and known.epoch == epoch and known.reason is reason
    if known is not None and again and known.message == message:
        return record
    time = known.time if known is not None and again else picture.clock.stamp
    failure = LastFailure(epoch=epoch, time=time, state=report.state, reason=reason, message=message)
    return record.model_copy(update={"last_failure": failure})
