"""Engines without a process: what a supervisor sees of an engine, at once and for next to nothing.

They behave as a group: connected when every rank of the epoch is there, a worker warm when rank 0 is, and a rank that
ends is lost to all others, who say so and end as well.
"""

import asyncio
import os

from mlx_operator_api.conditions import Reason
from mlx_runner import channel
from mlx_runner.progress import Phase, Snapshot
from mlx_runner.supervisor import evidence
from mlx_runner.supervisor.engine_process import EngineProcess
from mlx_runner.supervisor.engines import Engines

LAYERS = 4
_STILL = Snapshot(steps=0, tokens=0, phase=Phase.IDLE, waiting_for=-1, changed=0.0)
_KILLED = -9


class Group:
    """The engines of one ModelInstance, by epoch and rank."""

    def __init__(self) -> None:
        self._members: dict[int, dict[int, InstantEngine]] = {}
        self._warm: set[int] = set()

    def join(self, engine: "InstantEngine", command: channel.Connect) -> None:
        """An engine dials the others; all are connected once the last one is there."""
        members = self._members.setdefault(command.epoch, {})
        members[command.rank] = engine
        if len(members) == command.world_size:
            for member in members.values():
                member.say(channel.Connected())

    def warm_up(self, engine: "InstantEngine") -> None:
        """Rank 0 drives the first passes; the others are warm when it is."""
        epoch, rank = engine.place
        members = self._members.get(epoch, {rank: engine})
        if rank == 0:
            self._warm.add(epoch)
        if epoch in self._warm:
            for member in members.values() if rank == 0 else [engine]:
                member.say(channel.WarmedUp())

    def lost(self, engine: "InstantEngine") -> None:
        """An engine has ended: its peers read the end of its connection."""
        epoch, rank = engine.place
        members = self._members.get(epoch, {})
        if members.get(rank) is not engine:
            return
        del self._members[epoch]
        self._warm.discard(epoch)
        for other, member in members.items():
            if other != rank:
                words = f"connection to rank {rank} closed"
                member.say(channel.Failure(reason=Reason.PEER_LOST, message=words, peer=rank))
                member.end(channel.FAILURE_EXIT_CODE)


class InstantEngine(EngineProcess):
    """The interface of an engine's process; `end` is how it dies, with a return code as `subprocess` has it."""

    def __init__(self, group: Group) -> None:
        self.pid = os.getpid()
        self.started = True
        self.bare_bytes = 0
        self.reserved_bytes = 0
        self.place = (0, 0)
        """Epoch and rank, once it was told."""
        self.on_event = lambda event: None
        self.on_exit = lambda exit_: None
        self._group = group
        self._exit = asyncio.get_running_loop().create_future()

    @property
    def progress(self) -> Snapshot:
        """It never does anything for long."""
        return _STILL

    def say(self, event: channel.Event) -> None:
        """Tell the supervisor, in a turn of the loop of its own as a pipe would."""
        asyncio.get_running_loop().call_soon(self._deliver, event)

    def _deliver(self, event: channel.Event) -> None:
        self.on_event(event)

    def send(self, command: channel.Command) -> None:
        """Obey at once."""
        if not self.alive:
            return
        match command:
            case channel.Connect():
                self.place = (command.epoch, command.rank)
                self._group.join(self, command)
            case channel.Load():
                share = LAYERS // command.world_size
                first = (command.world_size - 1 - command.rank) * share
                layers = f"{first}-{first + share - 1}"
                self.say(channel.LayerLoaded(loaded=share, total=share, layers=layers))
                self.say(channel.Loaded(layers=layers, layers_total=share, bytes=1000))
            case channel.Warmup():
                self._group.warm_up(self)
            case channel.Goodbye():
                self.end(0)
            case _:
                raise NotImplementedError(command.kind)

    def end(self, code: int) -> None:
        """It is gone: its supervisor hears of it, and so do its peers."""
        if not self.alive:
            return
        exit_ = evidence.decode(code, 0, ())
        self._exit.set_result(exit_)
        asyncio.get_running_loop().call_soon(self._exited, exit_)
        self._group.lost(self)

    def _exited(self, exit_: evidence.Exit) -> None:
        self.on_exit(exit_)

    def kill(self) -> None:
        """SIGKILL."""
        self.end(_KILLED)

    def adopt(self) -> None:
        """Nothing of it lies in a cgroup."""


class InstantEngines(Engines):
    """Gives out instant engines; a spare would save nothing."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._used: InstantEngine | None = None

    @property
    def used(self) -> InstantEngine | None:
        """The engine of the present epoch."""
        return self._used

    async def take(self) -> EngineProcess:
        """A fresh one; the last one is killed first."""
        await self.close()
        self._used = InstantEngine(self._group)
        return self._used

    def prepare(self, delay: float = 0.0) -> None:
        """Nothing to do ahead of time."""

    def stand_by(self) -> None:
        """No spare."""

    async def close(self) -> None:
        """No engine any more."""
        if self._used is not None:
            self._used.kill()
