"""Requests of clients: a bounded queue before the engine, held while the group restarts.

The broker knows the engine only as a way to send commands; it never waits for it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_operator_api.tasks import ServingOptions
from mlx_runner import channel

log = logging.getLogger(__name__)

HOLD_SECONDS = 60.0
"""For how long after the group was last Ready new requests are held for the next epoch. Also after a Shutdown: only
the operator knows whether another epoch follows."""
QUEUE_SECONDS = 300.0
"""For how long a request waits for a place in a group that serves."""
NOT_READY = "not_ready"
"""Code of the error of a request that nobody began to answer."""
RETRY_SECONDS = 5
"""What `Retry-After` says."""


class UnavailableError(Exception):
    """503: no requests are accepted now; the text says why."""


class QueueFullError(Exception):
    """429: more requests wait than `serving.maxQueue` allows."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine of a running request is gone; `message` says what happened."""

    message: str


Answer = channel.Accepted | channel.Refused | channel.Delta | channel.Finished | Lost


@dataclass(slots=True)
class Ticket:
    """A request in the broker. `answers` gets the engine's words, in order."""

    command: channel.Generate
    answers: "asyncio.Queue[Answer]" = field(default_factory=asyncio.Queue)
    dispatched: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the engine got it; fails with `UnavailableError` when it never will."""
    accepted: bool = False
    """The engine began with it: sent again it might be answered twice."""
    returned: bool = False
    """Its engine was lost before it began. Once: what ends two engines in a row is not given to a third."""
    done: bool = False


class Broker:
    """All requests of this rank."""

    def __init__(self, on_active: Callable[[int], None], hold_seconds: float = HOLD_SECONDS) -> None:
        self.idle = asyncio.Event()
        """Set while the engine has no request."""
        self.idle.set()
        self._on_active = on_active
        self._hold_seconds = hold_seconds
        self._waiting: deque[Ticket] = deque()
        self._active: dict[str, Ticket] = {}
        self._send: Callable[[channel.Command], None] | None = None
        self._open = False
        self._limits = ServingOptions()
        self._closed: str | None = None
        self._given_up: str | None = None
        self._held_until: float | None = None
        self._hold: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """Requests in the engine."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place or for the next epoch."""
        return len(self._waiting)

    def refusal(self) -> str | None:
        """Why a new request would be answered 503; None when it is answered or held."""
        if self._closed is not None:
            return self._closed
        if self._open:
            return None
        if self._given_up is not None:
            return self._given_up
        if self._held_until is None:
            return "the model is not ready yet"
        if asyncio.get_running_loop().time() >= self._held_until:
            return f"the model has not been ready for more than {self._hold_seconds:g} s"
        return None

    # -- the group's side
    def open(self, send: Callable[[channel.Command], None], limits: ServingOptions) -> None:
        """The group is Ready: requests go to the engine by `send`."""
        if self._closed is not None:
            return
        self._send = send
        self._open = True
        self._limits = limits
        self._given_up = None
        self._cancel_hold()
        self._pump()

    def lose(self, message: str) -> None:
        """The engine is gone or going: what it had accepted gets `Lost`, the others are held for the next epoch."""
        self.pause()
        self._send = None
        held = self.refusal() is None
        back = []
        for ticket in list(self._active.values()):
            if held and not (ticket.accepted or ticket.returned or ticket.done):
                ticket.returned = True
                back.append(ticket)
            else:
                self._finish(ticket, Lost(message))
        self._active.clear()
        self.idle.set()
        self._waiting.extendleft(reversed(back))

    def pause(self) -> None:
        """No request goes to the engine from now on; those that wait, and new ones for a while, are held."""
        if not self._open:
            return
        self._open = False
        loop = asyncio.get_running_loop()
        self._held_until = loop.time() + self._hold_seconds
        self._hold = loop.call_later(
            self._hold_seconds, self._refuse_waiting, "the model did not become ready again in time"
        )

    def give_up(self, why: str) -> None:
        """No epoch comes by itself: nothing is held any more, until somebody helped and the group is Ready."""
        self._given_up = f"the model has failed and is not started again by itself: {why}"
        self._cancel_hold()
        self._refuse_waiting(self._given_up)

    def close(self, why: str) -> None:
        """No new request from now on (SIGTERM); running ones go on."""
        self._closed = why
        self._cancel_hold()
        self._refuse_waiting(why)

    def deliver(self, event: channel.Accepted | channel.Refused | channel.Delta | channel.Finished) -> None:
        """A word of the engine on a request; one on a request that is gone is dropped."""
        ticket = self._active.get(event.id)
        if ticket is None:
            return
        if isinstance(event, channel.Refused | channel.Finished):
            self._finish(ticket, event)
            self._pump()
        else:
            ticket.accepted = True
            ticket.answers.put_nowait(event)

    # -- the client's side
    def admit(self) -> None:
        """Would a request be taken in now?

        Raises:
            UnavailableError: nothing is accepted now.
            QueueFullError: too many wait already.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise UnavailableError(refusal)
        at_once = self._open and self.active < self._limits.max_concurrent_requests
        if not at_once and len(self._waiting) >= self._limits.max_queue:
            raise QueueFullError(
                f"{self.active} requests run and {len(self._waiting)} wait: the queue is full "
                f"(serving.maxConcurrentRequests={self._limits.max_concurrent_requests}, "
                f"serving.maxQueue={self._limits.max_queue})"
            )

    def enter(self, command: channel.Generate) -> Ticket:
        """Take a request in; raises as `admit` does."""
        self.admit()
        ticket = Ticket(command)
        self._waiting.append(ticket)
        self._pump()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The client has its answer, or left: in that case its place is freed by `Finished` of the engine."""
        if ticket.done:
            return
        ticket.done = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif self._send is not None and ticket.command.id in self._active:
            self._send(channel.Cancel(id=ticket.command.id))

    def _pump(self) -> None:
        while (
            self._open
            and self._send is not None
            and self._waiting
            and self.active < self._limits.max_concurrent_requests
        ):
            ticket = self._waiting.popleft()
            self._active[ticket.command.id] = ticket
            if not ticket.dispatched.done():
                ticket.dispatched.set_result(None)
            self.idle.clear()
            self._send(ticket.command)
        self._on_active(self.active)

    def _finish(self, ticket: Ticket, answer: Answer) -> None:
        del self._active[ticket.command.id]
        ticket.done = True
        ticket.answers.put_nowait(answer)
        if not self._active:
            self.idle.set()

    def _refuse_waiting(self, why: str) -> None:
        while self._waiting:
            ticket = self._waiting.popleft()
            ticket.done = True
            if not ticket.dispatched.done():
                ticket.dispatched.set_exception(UnavailableError(why))
            else:
                # Given back by a lost engine: its client waits for answers already.
                refused = channel.Refused(id=ticket.command.id, status=503, code=NOT_READY, message=why)
                ticket.answers.put_nowait(refused)

    def _cancel_hold(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
