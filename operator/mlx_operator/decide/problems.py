"""What keeps the pods, the runners or the model from getting on, in the words of whoever said so."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.modelinstance import OPERATOR_GRACE_SECONDS
from mlx_operator_api.source import SourceKind
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import PROTOCOL

from . import downloads, messages, refused, service
from .messages import clauses, evidence_line, listed, one_line, signal_name
from .picture import Picture, Rank, meeting, who
from .pods import PodView

_LASTING = (400, 403, 409, 413, 422)
"""HTTP status of a refusal that somebody has to do something about."""
MOUNT_SECONDS = 30.0
"""How long a volume may fail to mount before somebody has to look."""
_PULL = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable",
    "SignatureValidationFailed", "ImageInspectError",
}  # fmt: skip
_START = {
    "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError", "PreStartHookError",
    "PostStartHookError",
}  # fmt: skip
_PULL_PREFIX = re.compile(
    r'^((Back-off pulling image|Failed to pull image) "[^"]*":? ?'
    r"|(ErrImagePull|RegistryUnavailable|SignatureValidationFailed): )+"
)
_CLAIM = re.compile(r"persistentvolumeclaim|PersistentVolumeClaim")
_MOUNT = re.compile(r"MountVolume|Unable to attach or mount|FailedMount|AttachVolume|not found|sandbox")
_ALIKE = re.compile(r"; the same on \d+ ranks$")
_NO_IMAGE_VOLUME = re.compile(r"must specify (a|one) volume type|ImageVolumeMountFailed|image volumes? .*not support")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is in the way, though no runner failed."""

    where: ConditionType
    """The condition it makes False: Scheduled, ModelAvailable or Ready."""
    reason: Reason
    what: str
    """Who, what, evidence."""
    stalled: bool
    """Waiting alone will not help."""
    rank: int | None = None
    advice: str = ""
    """The next step."""

    @property
    def message(self) -> str:
        """The whole sentence."""
        return clauses(self.what, self.advice)


def find(picture: Picture, status: Status) -> Problem | None:
    """The problem to tell first: one that somebody has to solve, then the earliest of the lifecycle."""
    found = list(_all(picture, status))
    if not found:
        return None
    first = min(found, key=lambda p: (not p.stalled, p.reason.ordinal, -1 if p.rank is None else p.rank))
    alike = sum(p.reason is first.reason for p in found)
    return first if alike < 2 else replace(first, what=clauses(first.what, _alike(alike)))


def _alike(ranks: int) -> str:
    """The clause that `_ALIKE` finds."""
    return f"the same on {ranks} ranks"


def _all(picture: Picture, status: Status) -> Iterator[Problem]:
    yield from _service(picture)
    for rank in picture.ranks:
        found = _foreign(rank, picture) or _refused(rank, picture) or _placed(rank, picture)
        found = (
            found or _started(rank, picture) or _reached(rank, picture, status) or _downloaded(rank, picture, status)
        )
        if found is not None:
            yield found


def _problem(
    picture: Picture, rank: Rank, reason: Reason, words: str, *, stalled: bool, remedy: str | None = None
) -> Problem:
    name = names.pod_name(picture.wanted.name, rank.rank)
    subject = who(rank.rank, picture.wanted.world_size, name, rank.pod.node if rank.pod else None)
    what = one_line(f"{subject}: {words}", 700)
    advice = messages.remedy(reason, name) if remedy is None else remedy
    return Problem(ConditionType.SCHEDULED, reason, what, stalled, rank.rank, advice)


def _service(picture: Picture) -> Iterator[Problem]:
    name, found = names.service_name(picture.wanted.name), picture.observed.service
    refusal = picture.observed.refusals.get(name)
    if found is not None and not service.ours(found, picture.wanted):
        words = f"Service {name} exists and does not belong to this ModelInstance"
        remedy = Reason.CHILD_CONFLICT.remedy
        yield Problem(ConditionType.READY, Reason.CHILD_CONFLICT, words, stalled=True, advice=remedy)
    elif found is None and refusal is not None:
        words = f"Service {name}: the API server refused it (HTTP {refusal.status}): {one_line(refusal.message, 600)}"
        reason = Reason.CHILD_CONFLICT if refusal.status == 409 else Reason.POD_REFUSED
        yield Problem(ConditionType.READY, reason, words, stalled=True, advice=reason.remedy)


def _foreign(rank: Rank, picture: Picture) -> Problem | None:
    pod = rank.foreign
    if pod is None or pod.deleting or pod.owner == f"{names.KIND} {picture.wanted.name}":
        # The pod of a former ModelInstance of this name goes away by itself.
        return None
    words = f"a pod of this name exists and belongs to {pod.owner}"
    return _problem(picture, rank, Reason.CHILD_CONFLICT, words, stalled=True)


def _refused(rank: Rank, picture: Picture) -> Problem | None:
    refusal = rank.refusal
    if rank.pod is not None or rank.foreign is not None or refusal is None:
        return None
    said = refused.in_spec(refusal.message, picture.wanted, rank.rank)
    words = f"the API server refused the pod (HTTP {refusal.status}): {said}"
    if picture.wanted.source.kind is SourceKind.IMAGE and _NO_IMAGE_VOLUME.search(refusal.message):
        return _problem(picture, rank, Reason.IMAGE_VOLUME_UNSUPPORTED, words, stalled=True)
    reason = Reason.CHILD_CONFLICT if refusal.status == 409 else Reason.POD_REFUSED
    return _problem(picture, rank, reason, words, stalled=refusal.status in _LASTING)


def _placed(rank: Rank, picture: Picture) -> Problem | None:
    pod, clock = rank.pod, picture.clock
    if pod is None or pod.scheduled or pod.deleting or pod.over:
        return None
    late = pod.created is not None and clock.passed(pod.created + picture.wanted.deadline("schedule"))
    words = pod.schedule_message
    if _CLAIM.search(words):
        missing = "not found" in words
        return _problem(picture, rank, Reason.VOLUME_NOT_FOUND, words, stalled=missing or late)
    if pod.schedule_reason == "Unschedulable":
        return _problem(picture, rank, Reason.UNSCHEDULABLE, f"not placed: {words}", stalled=late)
    if not late:
        return None
    text = f"not placed within {picture.wanted.deadline('schedule').total_seconds():g} s: " + (
        words or pod.schedule_reason or "the scheduler said nothing: is it running?"
    )
    return _problem(picture, rank, Reason.SCHEDULE_TIMEOUT, text, stalled=True)


def _started(rank: Rank, picture: Picture) -> Problem | None:
    pod = rank.pod
    if pod is None or pod.deleting or rank.node_lost:
        return None
    if pod.over:
        words = f"its pod ended before it joined: {listed(pod.reason, pod.message) or pod.phase}; another one follows"
        return _problem(picture, rank, Reason.EVICTED, words, stalled=False, remedy="")
    if not pod.scheduled:
        return None
    box = pod.container
    if box.waiting in _PULL:
        return _pull(rank, pod, picture)
    if box.waiting in _START:
        words = f"{box.waiting}: {box.message}"
        if picture.wanted.source.kind is SourceKind.IMAGE and _NO_IMAGE_VOLUME.search(box.message):
            return _problem(picture, rank, Reason.IMAGE_VOLUME_UNSUPPORTED, words, stalled=True)
        return _problem(picture, rank, Reason.CONTAINER_START_ERROR, words, stalled=True)
    if box.ended is not None and not up(rank):
        return _crashing(rank, pod, picture)
    return _mounting(rank, pod, picture) if box.running is None else None


def up(rank: Rank) -> bool:
    """Its container runs, and is not just between two crashes: after one, only its supervisor's word counts."""
    pod = rank.pod
    if pod is None or not pod.runs:
        return False
    return pod.container.restarts == 0 or rank.alive or rank.record.pod_uid == pod.uid


def _pull(rank: Rank, pod: PodView, picture: Picture) -> Problem:
    """The registry's words; kept while the kubelet alternates between ErrImagePull and ImagePullBackOff."""
    box = pod.container
    words = _PULL_PREFIX.sub("", box.message)
    notes = (_PULL_PREFIX.sub("", note) for note in rank.notes if "pull" in note)
    words = words or next((note for note in notes if note), "") or box.waiting
    known = picture.stored.condition(ConditionType.SCHEDULED)
    source, remedy = picture.wanted.source, None
    if source.kind is SourceKind.IMAGE and source.name in box.message:
        remedy = messages.MODEL_IMAGE_REMEDY
    found = _problem(picture, rank, Reason.IMAGE_PULL_FAILED, words, stalled=True, remedy=remedy)
    if words == box.waiting and known is not None and known.reason is found.reason:
        told, advice = messages.split_advice(known.message, found.reason, [pod.name])
        if told.startswith(found.what.removesuffix(words)):
            return replace(found, what=_ALIKE.sub("", told), advice=advice)
    return found


def _crashing(rank: Rank, pod: PodView, picture: Picture) -> Problem | None:
    """It ends before its supervisor is heard; the kubelet tries again with a back-off of its own."""
    ended = pod.container.ended
    if ended is None or rank.record.pod_uid == pod.uid:
        return None
    signal = f" ({signal_name(ended.signal)})" if ended.signal else ""
    log = evidence_line(ended.message)
    oom = ended.reason == "OOMKilled"
    words = listed(
        f"container ends with exit code {ended.exit_code}{signal} before its supervisor answers",
        "OOMKilled" if oom else "",
        f"memory limit {pod.memory_limit}" if oom and pod.memory_limit else "",
        f"last words: {log}" if log else "",
    )
    reason = Reason.OUT_OF_MEMORY if oom else Reason.CONTAINER_CRASHED
    return _problem(picture, rank, reason, words, stalled=pod.container.restarts >= 2)


def _mounting(rank: Rank, pod: PodView, picture: Picture) -> Problem | None:
    clock, since = picture.clock, pod.scheduled_at or pod.created
    note = next((n for n in rank.notes if _MOUNT.search(n)), None)
    if since is None:
        return None
    if note is not None:
        late = clock.passed(since + timedelta(seconds=MOUNT_SECONDS))
        reason = Reason.VOLUME_NOT_FOUND if _CLAIM.search(note) else Reason.CONTAINER_START_ERROR
        return _problem(picture, rank, reason, note, stalled=late)
    limit = picture.wanted.deadline("pull")
    if not clock.passed(since + limit):
        return None
    words = f"its container did not start within {limit.total_seconds():g} s: "
    words += (rank.notes[0] if rank.notes else "") or pod.container.message or pod.container.waiting or "no word"
    return _problem(picture, rank, Reason.PULL_TIMEOUT, words, stalled=True)


def _reached(rank: Rank, picture: Picture, status: Status) -> Problem | None:
    """The pod runs, but its supervisor was not heard or cannot be understood."""
    pod, view = rank.pod, rank.view
    if pod is None or not pod.runs or not up(rank):
        return None
    if view.undecodable:
        found = _problem(picture, rank, Reason.REPORT_UNDECODABLE, view.error or "unreadable report", stalled=True)
        return replace(found, where=ConditionType.READY)
    if rank.report is not None and not rank.understood:
        # Version 1 is the first.
        spoken = " and ".join(str(version) for version in range(PROTOCOL, max(0, PROTOCOL - 2), -1))
        words = f"its supervisor speaks protocol {rank.report.protocol}, this operator {spoken}"
        found = _problem(picture, rank, Reason.PROTOCOL_MISMATCH, words, stalled=True)
        return replace(found, where=ConditionType.READY)
    joined = rank.record.epoch == status.epoch and rank.record.pod_uid == pod.uid
    started, begun = picture.settings.started, pod.container.running
    if rank.alive or joined or begun is None:
        return None
    since = max([begun, *([started] if started else []), *([view.received] if view.received else [])])
    limit = meeting(picture.wanted.deadline("unreachable")) + timedelta(seconds=OPERATOR_GRACE_SECONDS)
    if not picture.clock.passed(since + limit):
        return None
    why = f": {view.error}" if view.error else ""
    words = f"its container runs, but its supervisor cannot be reached{why}"
    found = _problem(picture, rank, Reason.RUNNER_UNREACHABLE, words, stalled=True)
    return replace(found, where=ConditionType.READY)


def _downloaded(rank: Rank, picture: Picture, status: Status) -> Problem | None:
    record = status.runner(rank.rank)
    noted = downloads.lasting(record)
    if noted is None or record.epoch != status.epoch or downloads.available(rank, status.epoch, picture.stored):
        return None
    remedy = messages.remedy(noted.reason, record.pod)
    if noted.reason is Reason.MODEL_NOT_FOUND and names.ADAPTER_FIELD in noted.message:
        remedy = messages.ADAPTER_REMEDY
    minutes = f"{downloads.RETRY_SECONDS / 60:g} minutes"
    again = "not tried again by itself" if noted.reason.retry is Retry.NEVER else f"tried again every {minutes}"
    words = clauses(noted.message, again)
    return Problem(ConditionType.MODEL_AVAILABLE, noted.reason, words, True, rank.rank, remedy)
