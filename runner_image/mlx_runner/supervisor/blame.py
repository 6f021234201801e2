"""Whose doing was the death of an engine? Pure.

A request that was there when an engine died of itself may be the cause. One that was there when somebody killed it,
froze it or cut it off is not, however often that happens.
"""

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import GroupCause

_FAULTS = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"})
"""Signals that a process brings upon itself. All others come from outside."""


def own_doing(reason: Reason, *, signal: str | None = None, abandoned: bool = False) -> bool:
    """Whether an engine that failed did so by itself.

    Args:
        reason: of the failure. Only a crash can be an engine's own doing: of a lost peer it is a consequence, a freeze
            looks the same when it comes from outside, and a kill for want of memory may be for anybody's memory.
        signal: that ended it, if one did.
        abandoned: its supervisor killed it, because it no longer kept to their protocol.
    """
    if reason is not Reason.ENGINE_CRASHED:
        return False
    return signal is None or abandoned or signal in _FAULTS


def verdict(reason: Reason, *, signal: str | None = None, abandoned: bool = False) -> bool | None:
    """As `own_doing`; None where only another rank's end explains this one."""
    return None if reason is Reason.PEER_LOST else own_doing(reason, signal=signal, abandoned=abandoned)


def explained(cause: GroupCause | None, epoch: int) -> bool:
    """Whether the failure of an epoch, in which this rank only lost a peer, was that peer's own doing."""
    return cause is not None and cause.epoch == epoch and own_doing(cause.reason, signal=cause.signal)
