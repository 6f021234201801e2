"""Why the container of a rank does not run (yet): in the scheduler's words, then in the kubelet's."""

import re
from dataclasses import replace
from datetime import timedelta

from mlx_operator_api.conditions import ConditionType, Reason

from . import ends, images, missing, remedies
from .messages import clauses, listed
from .picture import Picture, Rank
from .pods import PodView
from .problem import Problem, of_rank

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
_NEVER_RAN = {"StartError", "ContainerCannotRun"}
"""Why a container ended that the runtime could not start at all."""
_PULL_PREFIX = re.compile(
    r'^((Back-off pulling image|Failed to pull image) "[^"]*":? ?'
    r"|(ErrImagePull|RegistryUnavailable|SignatureValidationFailed): )+"
)
_NO_PULL_SECRET = re.compile(r"Unable to retrieve some image pull secrets \([^)]*\)")
_UNBOUND = re.compile(r'unbound immediate PersistentVolumeClaims|PVC is not bound|" bound to non-existent')
_MOUNT = re.compile(r"MountVolume|Unable to attach or mount|FailedMount|AttachVolume|not found|sandbox")
ALIKE = re.compile(r"; the same on \d+ ranks$")
"""What `problems.find` appends."""


def placed(rank: Rank, picture: Picture) -> Problem | None:
    """The scheduler finds no node for it."""
    pod, clock = rank.pod, picture.clock
    if pod is None or pod.scheduled or pod.deleting or pod.over:
        return None
    limit = picture.wanted.deadline("schedule")
    late = pod.created is not None and clock.passed(pod.created + limit)
    words, why = pod.schedule_message, pod.schedule_reason
    if (found := _claim(rank, pod, picture, words, stalled=late)) is not None:
        return found
    within = f" within {limit.total_seconds():g} s" if late else ""
    if why:
        said = words if why == "Unschedulable" else f"{why}: {words}"
        return of_rank(picture, rank, Reason.UNSCHEDULABLE, f"not placed{within}: {said}", stalled=late)
    if not late:
        return None
    text = f"not placed{within}: {words or 'the scheduler said nothing: is it running?'}"
    return of_rank(picture, rank, Reason.SCHEDULE_TIMEOUT, text, stalled=True)


def _claim(rank: Rank, pod: PodView, picture: Picture, words: str, *, stalled: bool) -> Problem | None:
    """A claim that does not exist, or that no volume is bound to: the scheduler and the kubelet tell both."""
    if (name := missing.claim(words)) is not None:
        remedy = missing.claim_remedy(picture, name)
        return of_rank(picture, rank, Reason.VOLUME_NOT_FOUND, words, stalled=True, remedy=remedy)
    if _UNBOUND.search(words):
        # The scheduler does not say which; where there is one, it is that.
        claims = " ".join(pod.claims)
        which = f"its claim is {claims}" if len(pod.claims) == 1 else f"its claims are {claims}" if claims else ""
        return of_rank(picture, rank, Reason.VOLUME_NOT_BOUND, clauses(words, which), stalled=stalled)
    return None


def started(rank: Rank, picture: Picture) -> Problem | None:
    """It has a node, and its container does not get to run."""
    pod = rank.pod
    if pod is None or pod.deleting or rank.node_lost:
        return None
    if pod.over:
        when = "is over" if rank.record.pod_uid == pod.uid else "ended before it joined"
        words = f"its pod {when}: {listed(pod.reason, pod.message) or pod.phase}; another one follows"
        return of_rank(picture, rank, Reason.EVICTED, words, stalled=False)
    if not pod.scheduled:
        return None
    box = pod.container
    if box.waiting in _PULL:
        return _pull(rank, pod, picture)
    if box.waiting in _START:
        return _not_created(rank, picture, f"{box.waiting}: {box.message}")
    if box.ended is not None and not up(rank):
        return _crashing(rank, pod, picture)
    return _mounting(rank, pod, picture) if box.running is None else None


def up(rank: Rank) -> bool:
    """Its container runs, and is not just between two crashes: after one, only its supervisor's word counts."""
    pod = rank.pod
    if pod is None or not pod.runs:
        return False
    return pod.container.restarts == 0 or rank.alive or rank.record.pod_uid == pod.uid


def _not_created(rank: Rank, picture: Picture, words: str) -> Problem:
    if (remedy := images.volume_remedy(picture.wanted, words)) is not None:
        return of_rank(picture, rank, Reason.IMAGE_VOLUME_UNSUPPORTED, words, stalled=True, remedy=remedy)
    remedy = missing.remedy(picture, words)
    return of_rank(picture, rank, Reason.CONTAINER_START_ERROR, words, stalled=True, remedy=remedy)


def _pull(rank: Rank, pod: PodView, picture: Picture) -> Problem:
    """The registry's words; kept while the kubelet alternates between ErrImagePull and ImagePullBackOff."""
    box = pod.container
    words = _PULL_PREFIX.sub("", box.message)
    notes = (_PULL_PREFIX.sub("", note.partition(": ")[2]) for note in rank.notes if "pull image" in note)
    words = words or next((note for note in notes if note), "") or box.waiting
    known = picture.stored.condition(ConditionType.SCHEDULED)
    remedy = images.pull_remedy(picture.wanted, box.message)
    secret = next((match[0] for note in rank.notes if (match := _NO_PULL_SECRET.search(note)) is not None), "")
    said = clauses(words, secret)
    found = of_rank(picture, rank, Reason.IMAGE_PULL_FAILED, said, stalled=True, remedy=remedy)
    if words == box.waiting and known is not None and known.reason is found.reason:
        told, advice = remedies.split(known.message, found.reason)
        if told.startswith(found.what.removesuffix(said)):
            return replace(found, what=ALIKE.sub("", told), advice=advice)
    return found


def _crashing(rank: Rank, pod: PodView, picture: Picture) -> Problem | None:
    """It ends before its supervisor is heard; the kubelet tries again with a back-off of its own."""
    ended = pod.container.ended
    if ended is None or rank.record.pod_uid == pod.uid:
        return None
    if ended.reason in _NEVER_RAN:
        return _not_created(rank, picture, f"{ended.reason}: {ended.message}")
    end = ends.of(ended, pod, rank.notes)
    words = listed(f"container ends with {end.code} before its supervisor answers", end.details)
    return of_rank(picture, rank, end.reason, words, stalled=pod.container.restarts >= 2)


def _mounting(rank: Rank, pod: PodView, picture: Picture) -> Problem | None:
    clock, since = picture.clock, pod.scheduled_at or pod.created
    note = next((n for n in rank.notes if _MOUNT.search(n)), None)
    if since is None:
        return None
    if note is not None:
        late = clock.passed(since + timedelta(seconds=MOUNT_SECONDS))
        found = _claim(rank, pod, picture, note, stalled=late)
        if found is not None:
            return replace(found, stalled=late)
        remedy = missing.remedy(picture, note)
        return of_rank(picture, rank, Reason.CONTAINER_START_ERROR, note, stalled=late, remedy=remedy)
    limit = picture.wanted.deadline("pull")
    if not clock.passed(since + limit):
        return None
    words = f"its container did not start within {limit.total_seconds():g} s: "
    words += (rank.notes[0] if rank.notes else "") or pod.container.message or pod.container.waiting or "no word"
    return of_rank(picture, rank, Reason.PULL_TIMEOUT, words, stalled=True)
