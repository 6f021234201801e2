"""One thing that is in the way, though no runner failed."""

from dataclasses import dataclass

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason

from . import remedies
from .messages import clauses, one_line
from .picture import Picture, Rank, who

MAX_WORDS = 700
"""Of who and what: the next step must fit behind it."""


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


def of_rank(
    picture: Picture,
    rank: Rank,
    reason: Reason,
    words: str,
    *,
    stalled: bool,
    remedy: str | None = None,
    where: ConditionType = ConditionType.SCHEDULED,
) -> Problem:
    """A problem of one rank's pod; `remedy` where the words alone do not tell what helps."""
    name = names.pod_name(picture.wanted.name, rank.rank)
    subject = who(rank.rank, picture.wanted.world_size, name, rank.pod.node if rank.pod else None)
    what = one_line(f"{subject}: {words}", MAX_WORDS)
    advice = remedies.find(reason, words, name) if remedy is None else remedies.of_pod(remedy, name)
    return Problem(where, reason, what, stalled, rank.rank, advice)
