"""An engine as the broker sees it, and what the clients of its requests were told."""

import asyncio

from mlx_runner import channel
from mlx_runner.supervisor.tickets import Answer, Lost, Ticket


class Engine:
    """What the broker sent."""

    def __init__(self) -> None:
        self.sent: list[channel.Command] = []
        self.active: list[int] = []

    def send(self, command: channel.Command) -> None:
        self.sent.append(command)

    @property
    def commands(self) -> list[channel.Generate]:
        return [command for command in self.sent if isinstance(command, channel.Generate)]

    @property
    def ids(self) -> list[str]:
        return [command.id for command in self.commands]


class EncodingEngine(Engine):
    """One that is told over the channel, as a real one."""

    def send(self, command: channel.Command) -> None:
        channel.encode(command)
        super().send(command)


def generate(number: int) -> channel.Generate:
    return channel.Generate(id=str(number), prompt="x")


def accepted(number: int) -> channel.Accepted:
    return channel.Accepted(id=str(number), prompt_tokens=1)


def delta(number: int, *tokens: int) -> channel.Delta:
    return channel.Delta(id=str(number), text="".join(f" {token}" for token in tokens), tokens=tokens)


def everything(ticket: Ticket) -> list[Answer]:
    """What its client was told so far."""
    return [ticket.answers.get_nowait() for _ in range(ticket.answers.qsize())]


async def last(ticket: Ticket) -> Lost:
    """How it was ended."""
    async with asyncio.timeout(30):
        while True:
            answer = await ticket.answers.get()
            if isinstance(answer, Lost):
                return answer


def finished(number: int) -> channel.Finished:
    return channel.Finished(id=str(number), finish_reason="stop", prompt_tokens=1, completion_tokens=1)
