"""Pods that have to go and do not."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from mlx_operator_api.conditions import ConditionType, Reason

from . import remedies
from .messages import clock_time, listed, one_line
from .picture import GONE_SECONDS, Picture
from .pods import PodView
from .problem import MAX_WORDS, Problem


@dataclass(frozen=True, slots=True)
class Held:
    """Why a pod is still there."""

    words: str
    lasting: bool = True
    """Waiting alone will not help."""


def held(pod: PodView, picture: Picture) -> Held | None:
    """Why a pod that should be gone, or be going, is still there; None: nothing is known to be wrong."""
    refusal = picture.observed.refusals.get(pod.uid)
    if refusal is not None and not pod.deleting:
        did = "did not finish in its time" if refusal.unfinished else "refused"
        words = f"the API server {did} to delete it (HTTP {refusal.status}): {refusal.message}"
        return Held(words, refusal.lasting)
    if pod.delete_by is None or not picture.clock.passed(pod.delete_by + timedelta(seconds=GONE_SECONDS)):
        return None
    words = f"it is being deleted and should have been gone by {clock_time(pod.delete_by)}"
    if not pod.finalizers:
        return Held(f"{words}: its kubelet does not confirm that its containers ended")
    plural = "s" if len(pod.finalizers) > 1 else ""
    return Held(f"{words}: held by the finalizer{plural} {listed(*pod.finalizers)}")


def unneeded(picture: Picture, pods: Iterable[PodView]) -> Problem | None:
    """The first of these pods, which no rank needs, that does not go."""
    for pod in pods:
        found = held(pod, picture)
        if found is not None:
            where = f" on node {pod.node}" if pod.node else ""
            what = one_line(f"pod {pod.name}{where}, which no rank needs: {found.words}", MAX_WORDS)
            advice = remedies.find(Reason.POD_STUCK, found.words, pod.name)
            return Problem(ConditionType.READY, Reason.POD_STUCK, what, stalled=found.lasting, advice=advice)
    return None
