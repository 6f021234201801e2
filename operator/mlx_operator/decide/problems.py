"""What keeps the pods, the runners or the model from getting on, in the words of whoever said so."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.deadlines import OPERATOR_GRACE_SECONDS
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import PROTOCOL

from . import children, departures, downloads, images, podstart, refused, remedies, restart, service
from .messages import clauses, clock_time, one_line
from .observed import Refusal
from .picture import Picture, Rank, effective, meeting
from .podstart import up
from .problem import MAX_WORDS, Problem, of_rank

ENDPOINT_SECONDS = 30.0
"""How long rank 0's pod may take to become Ready once every runner is."""


def find(picture: Picture, status: Status) -> Problem | None:
    """The problem to tell first: one that somebody has to solve, then the earliest of the lifecycle."""
    found = list(_all(picture, status))
    if not found:
        return None
    first = min(found, key=lambda p: (not p.stalled, p.reason.ordinal, -1 if p.rank is None else p.rank))
    alike = sum(p.reason is first.reason for p in found)
    return first if alike < 2 else replace(first, what=clauses(first.what, _alike(alike)))


def _alike(ranks: int) -> str:
    """The clause that `podstart.ALIKE` finds."""
    return f"the same on {ranks} ranks"


def _all(picture: Picture, status: Status) -> Iterator[Problem]:
    yield from _service(picture)
    for rank in picture.ranks:
        found = _foreign(rank, picture) or _refused(rank, picture) or _leaving(rank, picture, status)
        found = found or podstart.placed(rank, picture) or podstart.started(rank, picture)
        found = found or _reached(rank, picture, status) or _downloaded(rank, picture, status)
        if found is not None:
            yield found
    if (found := _endpoint(picture, status)) is not None:
        yield found


def _service(picture: Picture) -> Iterator[Problem]:
    name, found = names.service_name(picture.wanted.name), picture.observed.service
    refusal = picture.observed.refusals.get(name)
    if found is not None and not service.ours(found, picture.wanted):
        words = f"Service {name} exists and does not belong to this ModelInstance"
        remedy = Reason.CHILD_CONFLICT.remedy
        yield Problem(ConditionType.READY, Reason.CHILD_CONFLICT, words, stalled=True, advice=remedy)
    elif found is None and refusal is not None:
        conflict = refusal.status == 409
        words = "" if conflict else f"Service {name}: the API server {_did(refusal)} it (HTTP {refusal.status}): "
        words = one_line(words + refusal.message, MAX_WORDS)
        reason = Reason.CHILD_CONFLICT if conflict else Reason.POD_REFUSED
        advice = remedies.find(reason, words, None)
        yield Problem(ConditionType.READY, reason, words, stalled=refusal.lasting, advice=advice)


def _foreign(rank: Rank, picture: Picture) -> Problem | None:
    pod = rank.foreign
    if pod is None or pod.deleting or pod.owner == f"{names.KIND} {picture.wanted.name}":
        # The pod of a former ModelInstance of this name goes away by itself.
        return None
    words = f"a pod of this name exists and belongs to {pod.owner}"
    return of_rank(picture, rank, Reason.CHILD_CONFLICT, words, stalled=True)


def _refused(rank: Rank, picture: Picture) -> Problem | None:
    refusal = rank.refusal
    if rank.pod is not None or rank.foreign is not None or refusal is None:
        return None
    said = refused.in_spec(refusal.message, picture.wanted, rank.rank)
    words = f"the API server {_did(refusal)} {_what(refusal)} (HTTP {refusal.status}): {said}"
    if refusal.status == 409:
        return of_rank(picture, rank, Reason.CHILD_CONFLICT, refusal.message, stalled=True)
    if (remedy := images.volume_remedy(picture.wanted, refusal.message)) is not None:
        return of_rank(picture, rank, Reason.IMAGE_VOLUME_UNSUPPORTED, words, stalled=True, remedy=remedy)
    return of_rank(picture, rank, Reason.POD_REFUSED, words, stalled=refusal.lasting)


def _did(refusal: Refusal) -> str:
    return "did not finish in its time to create" if refusal.unfinished else "refused"


def _what(refusal: Refusal) -> str:
    """The Secret is made directly before its pod."""
    return "its Secret" if refusal.message.startswith("secrets ") else "the pod"


def _leaving(rank: Rank, picture: Picture, status: Status) -> Problem | None:
    """A pod that should be gone, or going, by now, and whose name the next one needs."""
    pod = rank.pod or rank.foreign
    if pod is None or (rank.node_lost and pod.deleting and not pod.finalizers):
        return None
    if not pod.deleting and children.why_delete(picture, status, rank, pod) is None:
        return None  # its deletion was refused once, and is no longer wanted
    found = departures.held(pod, picture)
    return None if found is None else of_rank(picture, rank, Reason.POD_STUCK, found.words, stalled=found.lasting)


def _reached(rank: Rank, picture: Picture, status: Status) -> Problem | None:
    """The pod runs, but its supervisor was not heard or cannot be understood."""
    pod, view = rank.pod, rank.view
    if pod is None or not pod.runs or not up(rank):
        return None
    where = ConditionType.READY
    if view.undecodable:
        words = view.error or "unreadable report"
        return of_rank(picture, rank, Reason.REPORT_UNDECODABLE, words, stalled=True, where=where)
    if rank.report is not None and not rank.understood:
        # Version 1 is the first.
        spoken = " and ".join(str(version) for version in range(PROTOCOL, max(0, PROTOCOL - 2), -1))
        words = f"its supervisor speaks protocol {rank.report.protocol}, this operator {spoken}"
        return of_rank(picture, rank, Reason.PROTOCOL_MISMATCH, words, stalled=True, where=where)
    joined = rank.record.epoch == status.epoch and rank.record.pod_uid == pod.uid
    started, begun = picture.settings.started, pod.container.running
    if rank.alive or joined or begun is None:
        return None
    since = max([begun, *([started] if started else []), *([view.received] if view.received else [])])
    limit = meeting(picture.wanted.deadline("unreachable")) + timedelta(seconds=OPERATOR_GRACE_SECONDS)
    if not picture.clock.passed(since + limit):
        return None
    why = f": {view.error}" if view.error else ""
    words = f"its container runs, but its supervisor was not reached within {limit.total_seconds():g} s{why}"
    return of_rank(picture, rank, Reason.RUNNER_UNREACHABLE, words, stalled=True, where=where)


def _downloaded(rank: Rank, picture: Picture, status: Status) -> Problem | None:
    record = status.runner(rank.rank)
    noted = downloads.lasting(record)
    if noted is None or record.epoch != status.epoch or downloads.available(rank, status.epoch, picture.stored):
        return None
    remedy = remedies.find(noted.reason, noted.message, record.pod)
    if noted.reason is Reason.MODEL_NOT_FOUND and names.ADAPTER_FIELD in noted.message:
        remedy = remedies.ADAPTER
    minutes = f"{downloads.RETRY_SECONDS / 60:g} minutes"
    again = "not tried again by itself" if noted.reason.retry is Retry.NEVER else f"tried again every {minutes}"
    words = clauses(noted.message, again)
    return Problem(ConditionType.MODEL_AVAILABLE, noted.reason, words, True, rank.rank, remedy)


def _endpoint(picture: Picture, status: Status) -> Problem | None:
    """Every runner is ready, and rank 0's pod is not: clients of the Service reach nobody."""
    rank, clock = picture.ranks[0], picture.clock
    pod = rank.pod
    if pod is None or not pod.runs or pod.ready or restart.open_failure(status) is not None:
        return None
    if any(effective(other, status.epoch) is not RunnerState.READY for other in picture.ranks):
        return None
    times = [other.record.since for other in picture.ranks] + [pod.ready_since]
    since = max((time for time in times if time is not None), default=clock.now)
    if not clock.passed(since + timedelta(seconds=ENDPOINT_SECONDS)):
        return None
    words = f"its runner is ready, but the pod is not Ready since {clock_time(since)}"
    said = f"{words}: {pod.ready_words}" if pod.ready_words else words
    node = picture.observed.nodes.get(pod.node or "")
    if node is not None and not node.ready:
        said = f"{said}; its node {node.name} is NotReady"
    return of_rank(picture, rank, Reason.POD_NOT_READY, said, stalled=True, where=ConditionType.READY)
