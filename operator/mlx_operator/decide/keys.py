"""A new key of the operator: which instances go on with pods of the old one until it is their turn."""

from dataclasses import replace
from datetime import datetime, timedelta

from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.status import Status

from . import epoch
from .picture import Picture, Rank, outdated

AGAIN_SECONDS = 60.0
"""How often an instance asks at least whether it is its turn."""


def may_wait(picture: Picture, status: Status) -> bool:
    """Whether the operator's key is all that changed of a group that serves, as far as its pods show.

    Nothing is heard of its runners while it waits: whatever its pods tell of trouble ends the wait.
    """
    ready = status.condition(ConditionType.READY)
    if ready is None or ready.status != "True":
        return False
    if not all(_serves(rank, picture, ready.last_transition_time) for rank in picture.ranks):
        return False
    known = {rank.pod.token_secret.rpartition("-")[2] for rank in picture.ranks if rank.pod and rank.pod.token_secret}
    if len(known) != 1:
        return False
    before = replace(picture.settings, key_id=known.pop())
    return epoch.due(replace(picture, observed=replace(picture.observed, settings=before)), status) is None


def _serves(rank: Rank, picture: Picture, since: datetime) -> bool:
    pod = rank.pod
    if pod is None or not pod.runs or pod.uid != rank.record.pod_uid or rank.node_lost or not outdated(pod, picture):
        return False
    begun = pod.container.running
    return begun is not None and begun <= since and pod.disruption == "" and (pod.ready or rank.rank > 0)


def again(picture: Picture) -> datetime:
    """When to ask again whether it is its turn."""
    return picture.clock.now + timedelta(seconds=AGAIN_SECONDS)
