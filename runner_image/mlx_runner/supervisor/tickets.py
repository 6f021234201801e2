"""A request of a client in the supervisor: what was asked, what was answered so far, and how it ended."""

import asyncio
import logging
from collections.abc import Sized
from dataclasses import dataclass, field
from enum import StrEnum

from mlx_runner import channel

log = logging.getLogger(__name__)

RETRY_SECONDS = 5
"""What `Retry-After` says."""
NOT_READY = "not_ready"
"""Code of the error of a request that nobody began to answer."""
RUNNER_FAILED = "runner_failed"
"""Code of the error of a request whose answer broke off."""
CRASHES_ENGINE = "request_crashes_engine"
"""Code of the error of a request that engines died of."""


class Outcome(StrEnum):
    """How a request ended, for the metrics."""

    FINISHED = "finished"
    """Answered to its end."""
    REFUSED = "refused"
    """The engine found it not valid for this model, or failed on it alone."""
    CANCELLED = "cancelled"
    """Its client left."""
    QUEUE_FULL = "queue_full"
    """Not taken in: 429."""
    UNAVAILABLE = "unavailable"
    """Not begun: 503."""
    LOST = "lost"
    """Begun, and broken off: its engine was lost, and none went on in time."""
    CRASHES_ENGINE = "crashes_engine"
    """Taken for the cause of two deaths of an engine."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Nobody goes on with the answer; the message says to the client what happened."""

    message: str
    status: int = 503
    code: str = RUNNER_FAILED


@dataclass(frozen=True, slots=True)
class Paused:
    """The engine is gone; the next one goes on after so many tokens."""

    tokens: int


Answer = channel.Accepted | channel.Refused | channel.Delta | channel.Finished | Paused | Lost


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the group serves in an epoch."""

    name: str = ""
    source: str = ""
    adapter: str | None = None
    digest: str | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in the broker. `answers` gets the engine's words, in order; times are those of the event loop."""

    command: channel.Generate
    asked: str
    """The name of the model that it is for."""
    entered: float
    answers: "asyncio.Queue[Answer]" = field(default_factory=asyncio.Queue)
    dispatched: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when an engine got it for the first time; fails with `UnavailableError` when none ever will."""
    model: ServedModel | None = None
    """What the last engine that had it served."""
    prompt_tokens: int | None = None
    """Known once an engine has begun with it: told only once."""
    max_tokens: int | None = None
    """Of its answer, as the first engine with this model decided."""
    tokens: list[int] = field(default_factory=list)
    """Ids that the client has the text of, from whatever engine."""
    proven: bool = False
    """The engine that has it lived long enough to give a token of it."""
    deaths: int = 0
    """Engines that died by their own doing while they had it, without a token of it in between."""
    lost: str | None = None
    """What happened to its engine, while it waits for the next one."""
    deadline: float | None = None
    """Since an engine was lost, and until the next one gives a token: when the wait for that one ends."""
    timer: asyncio.TimerHandle | None = None
    first_token: float | None = None
    done: bool = False

    @property
    def begun(self) -> bool:
        """Whether an engine has begun with it."""
        return self.prompt_tokens is not None

    def resumed(self) -> channel.Generate:
        """The command for the next engine: it goes on where the last one was lost, with what the first one granted."""
        granted = {} if self.max_tokens is None else {"max_tokens": self.max_tokens, "accepted": True}
        given = {"resume": tuple(self.tokens)} if self.tokens else {}
        return self.command.model_copy(update={**granted, **given}) if granted or given else self.command

    def stop_timer(self) -> None:
        """No longer end it at its deadline."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Observer:
    """Hears what becomes of requests. This one does nothing."""

    def queued(self, ticket: Ticket, seconds: float) -> None:
        """It waited this long for its place."""

    def accepted(self, ticket: Ticket, prompt_tokens: int) -> None:
        """An engine began with it, for the first time."""

    def given(self, ticket: Ticket, tokens: int) -> None:
        """So many tokens of its answer came."""

    def began(self, ticket: Ticket, seconds: float) -> None:
        """Its first token came this long after it."""

    def resumed(self, ticket: Ticket) -> None:
        """Another engine goes on with it."""

    def ended(self, ticket: Ticket, outcome: Outcome, seconds: float, finished: channel.Finished | None) -> None:
        """It ended, this long after it came."""

    def turned_away(self, outcome: Outcome) -> None:
        """It was not taken in."""


def unsayable(request_id: str, error: channel.EncodingError) -> channel.Refused:
    """The answer to a request that cannot be written to the channel: what is wrong with it should have been found."""
    log.error("request %s cannot be given to an engine: %s", request_id, error)
    message = "this request cannot be given to an engine: the log of the runner says why"
    return channel.Refused(id=request_id, status=500, code=channel.INTERNAL_ERROR, message=message)


def shape(ticket: Ticket) -> str:
    """A request without a word of its text, for logs: endpoint, numbers, and the sizes of everything else."""
    command = ticket.command
    endpoint = "completions" if command.messages is None else "chat/completions"
    facts = [
        f"id={command.id}",
        f"endpoint={endpoint}",
        f"prompt_tokens={ticket.prompt_tokens}",
        f"tokens_given={len(ticket.tokens)}",
    ]
    for name in type(command).model_fields:
        value = getattr(command, name)
        if name in ("kind", "id", "resume") or value is None:
            continue
        if isinstance(value, int | float):
            facts.append(f"{name}={value}")
        elif isinstance(value, Sized) and len(value):
            facts.append(f"len({name})={len(value)}")
    return " ".join(facts)
