"""Whose doing was the death of an engine? Pure.

A request that was there when an engine died of itself may be the cause. One that was there when somebody killed it,
froze it or cut it off is not, however often that happens.
"""

from mlx_operator_api.conditions import Reason

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
