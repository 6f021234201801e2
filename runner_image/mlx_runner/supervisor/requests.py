"""Requests of clients: a bounded queue before the engine, held while the group restarts.

The broker knows the engine only as a way to send commands; it never waits for it. A request outlives its engine: the
next one goes on where the last one was lost, and its client notices a pause.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from mlx_operator_api.tasks import DeadlineSeconds, ServingOptions
from mlx_runner import channel

from .questions import Questions
from .tickets import CRASHES_ENGINE, NOT_READY, Lost, Observer, Outcome, Paused, ServedModel, Ticket, shape, unsayable

log = logging.getLogger(__name__)

QUEUE_SECONDS = 300.0
"""For how long a request waits for a place in a group that serves."""
MAX_DEATHS = 2
"""Engines that die by their own doing while they have a request, before it is taken for the cause."""
_ANY = ServedModel()


class UnavailableError(Exception):
    """503: no requests are accepted now; the text says why."""


class QueueFullError(Exception):
    """429: more requests wait than `serving.maxQueue` allows."""


class Broker:
    """All requests of this rank."""

    def __init__(self, on_active: Callable[[int], None]) -> None:
        self.idle = asyncio.Event()
        """Set while the engine has no request."""
        self.idle.set()
        self.observer = Observer()
        self.questions = Questions()
        self._on_active = on_active
        self._resume_seconds = 0.0
        self._waiting: deque[Ticket] = deque()
        self._active: dict[str, Ticket] = {}
        self._send: Callable[[channel.Command], None] | None = None
        self._open = False
        self._limits = ServingOptions()
        self._model = _ANY
        self._closed: str | None = None
        self._given_up: str | None = None
        self._unexplained: list[Ticket] = []
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

    @property
    def capacity(self) -> int:
        """Requests that may run and wait at once."""
        return self._limits.max_concurrent_requests + self._limits.max_queue

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
        if _now() >= self._held_until:
            return f"the model has not been ready for more than {self._resume_seconds:g} s"
        return None

    # -- the group's side
    def open(
        self,
        send: Callable[[channel.Command], None],
        limits: ServingOptions,
        *,
        model: ServedModel = _ANY,
        resume_seconds: float = DeadlineSeconds().resume,
    ) -> None:
        """The group is Ready: requests go to the engine by `send`.

        Args:
            send: gives the engine a command.
            limits: how many requests run and wait.
            model: what is served: what an epoch with another model began cannot be gone on with.
            resume_seconds: for how long requests wait for the next epoch, once this one is over.
        """
        if self._closed is not None:
            return
        self._send = send
        self.questions.open(send)
        self._open = True
        self._limits = limits
        self._model = model
        self._resume_seconds = resume_seconds
        self._given_up = None
        self._cancel_hold()
        for ticket in list(self._waiting):
            ticket.stop_timer()
            if ticket.asked != model.name or (ticket.tokens and ticket.model != model):
                self._abandon(ticket, "another model is served now")
        self._pump()

    def lose(self, message: str, *, own_doing: bool | None = None) -> None:
        """The engine is gone or going: what it had goes first to that of the next epoch.

        `own_doing`: nobody else ended it. What is there when that happens twice, without a token in between, is not
        given to a third engine. None: another rank may be the cause, and `explain` tells.
        """
        self.pause()
        self._send = None
        self.questions.lose(message)
        held = self.refusal() is None
        back = []
        for ticket in list(self._active.values()):
            ticket.proven = False
            ticket.lost = message
            if ticket.done:
                continue  # its client has left
            if own_doing and self._is_deadly(ticket):
                continue
            if held:
                back.append(ticket)
            else:
                self._end(ticket, Lost(_broken_off(ticket)), Outcome.LOST)
        if self._active:
            self._unexplained = back if own_doing is None else []
        self._active.clear()
        self.idle.set()
        self._waiting.extendleft(reversed(back))
        for ticket in back:
            self._hold_ticket(ticket)
            ticket.answers.put_nowait(Paused(len(ticket.tokens)))

    def explain(self, *, own_doing: bool) -> None:
        """Whether the last engine, where that was not known, or a peer of it, died by its own doing."""
        unexplained, self._unexplained = self._unexplained, []
        for ticket in unexplained:
            if own_doing and not ticket.done and self._is_deadly(ticket):
                self._waiting.remove(ticket)

    def pause(self) -> None:
        """No request goes to the engine from now on; those that wait, and new ones for a while, are held."""
        if not self._open:
            return
        self._open = False
        self._held_until = _now() + self._resume_seconds
        self._hold = asyncio.get_running_loop().call_at(self._held_until, self._hold_is_over)
        for ticket in self._waiting:
            if ticket.deadline is not None:
                self._hold_ticket(ticket)

    def give_up(self, why: str) -> None:
        """No epoch comes by itself: nothing is held any more, until somebody helped and the group is Ready."""
        self.pause()
        self._given_up = self._given_up or f"the model has failed and is not started again by itself: {why}"
        self._cancel_hold()
        self._abandon_waiting(self._given_up)

    def close(self, why: str) -> None:
        """No new request from now on (SIGTERM); running ones go on."""
        self._closed = why
        self._cancel_hold()
        self._abandon_waiting(why)

    def deliver(self, event: channel.Accepted | channel.Refused | channel.Delta | channel.Finished) -> None:
        """A word of the engine on a request; one on a request that is gone is dropped."""
        ticket = self._active.get(event.id)
        if ticket is None:
            if isinstance(event, channel.Refused):
                self.questions.deliver(event)
            return
        match event:
            case channel.Accepted():
                if ticket.max_tokens is None:
                    ticket.max_tokens = event.max_tokens
                if not ticket.begun:
                    ticket.prompt_tokens = event.prompt_tokens
                    self.observer.accepted(ticket, event.prompt_tokens)
                    ticket.answers.put_nowait(event)
            case channel.Delta():
                self._given(ticket, event)
            case channel.Refused() | channel.Finished():
                del self._active[event.id]
                if not ticket.done:
                    finished = event if isinstance(event, channel.Finished) else None
                    self._end(ticket, event, Outcome.FINISHED if finished else Outcome.REFUSED, finished)
                if not self._active:
                    self.idle.set()
                self._pump()

    # -- the client's side
    def admit(self) -> None:
        """Would a request be taken in now?

        Raises:
            UnavailableError: nothing is accepted now.
            QueueFullError: too many wait already.
        """
        refusal = self.refusal()
        if refusal is not None:
            self.observer.turned_away(Outcome.UNAVAILABLE)
            raise UnavailableError(refusal)
        at_once = self._open and self.active < self._limits.max_concurrent_requests
        # Those that an engine was lost with had their place already.
        new = sum(ticket.lost is None for ticket in self._waiting)
        if not at_once and new >= self._limits.max_queue:
            self.observer.turned_away(Outcome.QUEUE_FULL)
            raise QueueFullError(
                f"{self.active} requests run and {len(self._waiting)} wait: the queue is full "
                f"(serving.maxConcurrentRequests={self._limits.max_concurrent_requests}, "
                f"serving.maxQueue={self._limits.max_queue})"
            )

    def enter(self, command: channel.Generate, model: str = _ANY.name) -> Ticket:
        """Take a request for a model in; raises as `admit` does."""
        self.admit()
        ticket = Ticket(command, model, _now())
        self._waiting.append(ticket)
        self._pump()
        return ticket

    def leave(self, ticket: Ticket, outcome: Outcome = Outcome.CANCELLED) -> None:
        """The client has its answer, or left: in that case its place is freed by `Finished` of the engine."""
        if ticket.done:
            return
        self._done(ticket, outcome)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif self._send is not None and ticket.command.id in self._active:
            self._send(channel.Cancel(id=ticket.command.id))

    # -- dispatch
    def _pump(self) -> None:
        while self._send is not None and (ticket := self._next()) is not None:
            self._active[ticket.command.id] = ticket
            self._dispatched(ticket)
            self.idle.clear()
            try:
                self._send(ticket.resumed())
            except channel.EncodingError as error:
                self._unsent(ticket, error)
        self._on_active(self.active)

    def _unsent(self, ticket: Ticket, error: channel.EncodingError) -> None:
        """No engine can be told of it: it ends here, and with it nobody else."""
        del self._active[ticket.command.id]
        if not self._active:
            self.idle.set()
        self._end(ticket, unsayable(ticket.command.id, error), Outcome.REFUSED)

    def _next(self) -> Ticket | None:
        """Who goes to the engine now.

        One that saw an engine die by its own doing goes while no other is there that was given no token yet: if the
        next engine dies as well, it is known who was the cause.
        """
        if not (self._open and self._waiting and self.active < self._limits.max_concurrent_requests):
            return None
        unproven = [ticket for ticket in self._active.values() if not ticket.proven]
        if any(ticket.deaths for ticket in unproven) or (unproven and self._waiting[0].deaths):
            return None
        return self._waiting.popleft()

    def _dispatched(self, ticket: Ticket) -> None:
        if ticket.model != self._model:
            ticket.model, ticket.max_tokens = self._model, None
        if ticket.dispatched.done():
            log.info("request %s goes on after %d tokens", ticket.command.id, len(ticket.tokens))
            self.observer.resumed(ticket)
        else:
            ticket.dispatched.set_result(None)
            self.observer.queued(ticket, _now() - ticket.entered)
        ticket.stop_timer()
        ticket.lost = None

    def _given(self, ticket: Ticket, delta: channel.Delta) -> None:
        ticket.tokens += delta.tokens
        self.observer.given(ticket, len(delta.tokens))
        ticket.deadline = None
        if ticket.first_token is None:
            ticket.first_token = _now()
            self.observer.began(ticket, ticket.first_token - ticket.entered)
        ticket.answers.put_nowait(delta)
        if not ticket.proven:
            ticket.proven = True
            ticket.deaths = 0
            self._pump()

    # -- the end of a request
    def _done(self, ticket: Ticket, outcome: Outcome, finished: channel.Finished | None = None) -> None:
        ticket.done = True
        ticket.stop_timer()
        self.observer.ended(ticket, outcome, _now() - ticket.entered, finished)

    def _end(
        self,
        ticket: Ticket,
        answer: channel.Refused | channel.Finished | Lost,
        outcome: Outcome,
        finished: channel.Finished | None = None,
    ) -> None:
        self._done(ticket, outcome, finished)
        ticket.answers.put_nowait(answer)

    def _is_deadly(self, ticket: Ticket) -> bool:
        """Count a death; after too many the request is refused."""
        ticket.deaths += 1
        if ticket.deaths < MAX_DEATHS:
            return False
        log.error("a request is taken for the cause of %d deaths of the engine: %s", ticket.deaths, shape(ticket))
        message = (
            f"{ticket.deaths} engines in a row died by themselves while they had this request, without a token of it "
            f"in between: it is not tried again; the last one: {ticket.lost}"
        )
        self._end(ticket, Lost(message, 500, CRASHES_ENGINE), Outcome.CRASHES_ENGINE)
        return True

    def _abandon(self, ticket: Ticket, why: str) -> None:
        """End one that waits: no engine comes for it."""
        self._waiting.remove(ticket)
        if not ticket.dispatched.done():
            self._done(ticket, Outcome.UNAVAILABLE)
            ticket.dispatched.set_exception(UnavailableError(why))
            ticket.dispatched.exception()  # of several choices only the first is waited for: not a lost exception
        elif ticket.begun:
            self._end(ticket, Lost(f"{_broken_off(ticket)}; {why}"), Outcome.LOST)
        else:
            self._end(ticket, Lost(why, code=NOT_READY), Outcome.UNAVAILABLE)

    def _abandon_waiting(self, why: str) -> None:
        for ticket in list(self._waiting):
            self._abandon(ticket, why)

    # -- waiting for the next epoch
    def _hold_ticket(self, ticket: Ticket) -> None:
        if ticket.deadline is None:
            ticket.deadline = _now() + self._resume_seconds
        why = f"the model did not become ready again within {self._resume_seconds:g} s"
        ticket.stop_timer()
        ticket.timer = asyncio.get_running_loop().call_at(ticket.deadline, self._abandon, ticket, why)

    def _hold_is_over(self) -> None:
        """For those that no engine had yet; the others have times of their own."""
        for ticket in [ticket for ticket in self._waiting if ticket.deadline is None]:
            self._abandon(ticket, "the model did not become ready again in time")

    def _cancel_hold(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None


def _broken_off(ticket: Ticket) -> str:
    return f"the model's runner failed after {len(ticket.tokens)} tokens of the answer: {ticket.lost}"


def _now() -> float:
    return asyncio.get_running_loop().time()
