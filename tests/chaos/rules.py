"""What a bad network, or an API server in trouble, does to a request: each is a rule of `FaultProxy`."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Call(NamedTuple):
    """A request as the proxy sees it; `at` is the event loop's clock."""

    at: float
    method: str
    path: str
    watch: bool

    @property
    def lease(self) -> bool:
        """Of the leader's Lease."""
        return "/leases" in self.path

    @property
    def write(self) -> bool:
        """Changes something."""
        return self.method != "GET"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answered with an error and not carried out. 429 carries `Retry-After: 1`."""

    statuses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hang:
    """Not answered while the rule lasts, then the connection breaks."""

    carried_out: bool = False


@dataclass(frozen=True, slots=True)
class HangUp:
    """The connection breaks: before the request was carried out, or after, with the answer lost."""

    carried_out: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection breaks in the middle of the answer; of a watch, in the middle of its next event."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Carried out and answered, so many seconds later."""

    seconds: float


Trouble = Refuse | Hang | HangUp | Cut | Delay


def anything(_: Call) -> bool:
    """Every request, the Lease's too: a leader cannot hold on for long."""
    return True


def not_leases(call: Call) -> bool:
    """Every request but the Lease's, whose loss ends a leader and has tests of its own."""
    return not call.lease


def writes(call: Call) -> bool:
    """Requests that change something, but for the Lease's."""
    return call.write and not call.lease


def watches(call: Call) -> bool:
    """Watches that are opened."""
    return call.watch


@dataclass(eq=False, slots=True)
class Rule:
    """`share` of the requests that `meets` picks are in trouble."""

    meets: Callable[[Call], bool]
    trouble: Trouble
    share: float = 1.0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the rule ends."""

    def strikes(self, call: Call, chance: random.Random) -> bool:
        """Whether this request is in trouble."""
        return self.meets(call) and (self.share >= 1.0 or chance.random() < self.share)
