"""The children: the client Service, and one pod for each rank."""

from collections.abc import Iterator
from datetime import timedelta

from mlx_operator_api import names
from mlx_operator_api.status import Status

from . import restart, service, template
from .actions import Action, ApplyService, CreatePod, DeletePod
from .picture import Picture, Rank, node_lost
from .pods import PodView

REPLACE_SECONDS = 10.0
"""A pod that ended before it joined is replaced no sooner: what ended it may do so again."""


def keep(picture: Picture, status: Status) -> tuple[Action, ...]:
    """Create what is missing, delete what is in the way."""
    pods = (action for rank in picture.ranks for action in _pod(picture, status, rank))
    return (*service_of(picture), *_surplus(picture), *pods)


def remove(picture: Picture) -> tuple[Action, ...]:
    """Delete all pods; they drain within their grace period."""
    deletions = (
        deletion
        for rank in picture.ranks
        if rank.pod is not None
        for deletion in _delete(rank.pod, "the instance is suspended", rank.node_lost)
    )
    return (*service_of(picture), *_surplus(picture), *deletions)


def service_of(picture: Picture) -> Iterator[Action]:
    """Create or correct the client Service."""
    found, wanted = picture.observed.service, picture.wanted
    if found is None or (service.ours(found, wanted) and service.differs(found, wanted)):
        yield ApplyService(names.service_name(wanted.name), service.manifest(wanted))


def _surplus(picture: Picture) -> Iterator[Action]:
    for pod in picture.surplus:
        lost = pod.deleting and node_lost(pod.node, pod.deleting, picture.observed)
        yield from _delete(pod, "no rank needs it", lost)


def _pod(picture: Picture, status: Status, rank: Rank) -> Iterator[Action]:
    pod = rank.pod
    if pod is None:
        if rank.foreign is None:
            yield _create(picture, status, rank.rank)
        return
    why = why_delete(picture, status, rank, pod)
    if why is not None:
        yield from _delete(pod, why, rank.node_lost)


def _create(picture: Picture, status: Status, rank: int) -> CreatePod:
    wanted, settings = picture.wanted, picture.settings
    return CreatePod(
        name=names.pod_name(wanted.name, rank),
        rank=rank,
        manifest=template.pod(wanted, rank, status.runner_image or settings.runner_image, settings),
        secret=names.secret_name(wanted.name, wanted.uid, settings.key_id),
    )


def why_delete(picture: Picture, status: Status, rank: Rank, pod: PodView) -> str | None:
    """Why a rank's pod has to go; None: it has not."""
    clock = picture.clock
    if rank.node_lost:
        return f"its node {pod.node} is lost"
    if pod.template_hash != status.template_hash:
        return "its template changed"
    if pod.over:
        joined = rank.record.pod_uid == pod.uid
        old_enough = pod.created is None or clock.passed(pod.created + timedelta(seconds=REPLACE_SECONDS))
        return f"it is over: {pod.reason or pod.phase}" if joined or old_enough else None
    return _crash_loop(picture, status, rank, pod)


def _crash_loop(picture: Picture, status: Status, rank: Rank, pod: PodView) -> str | None:
    """The kubelet's back-off is longer than ours: a new pod starts at once. Its evidence is in status already."""
    failure = restart.open_failure(status)
    if failure is None or restart.final_failure(status) is not None:
        return None
    if pod.container.waiting != "CrashLoopBackOff" or rank.record.pod_uid != pod.uid:
        return None
    due = status.next_restart_at
    return "its container's back-off is longer than the group's" if due is None or picture.clock.passed(due) else None


def _delete(pod: PodView, why: str, lost: bool) -> Iterator[Action]:
    """By force where no kubelet can answer; a pod that is going already is left alone otherwise."""
    if lost:
        yield DeletePod(pod.name, pod.uid, why, grace_seconds=0, rank=pod.rank)
    elif not pod.deleting:
        yield DeletePod(pod.name, pod.uid, why, rank=pod.rank)
