"""Putting a rank together: its connections, its shard, and the loop that serves with them."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from mlx_runner.progress import Phase, Progress

from . import load as loading
from . import pipeline, ring
from .blocks import rows_in
from .events import Events
from .failures import Ending
from .forward import Compute, Executor, PipelineStage, WholeModel
from .group import Former, Group
from .hidden import HiddenIn, HiddenOut
from .leader import Leader
from .prepare import Limits
from .requests import Requests
from .scheduler import Emission, Scheduler
from .tail import Tail
from .text import load_tokenizer
from .worker import WarmUpGate, Worker

_FRAMES_AHEAD = 4
"""In a pipeline the stages prefill several batches, or chunks of a long prompt, at the same time."""
_PIPELINE_LANES = 2
"""Tensor ranks compute everything together, and a rank alone has nobody to wait for: one lane each."""
_WORKER_GOODBYE_SECONDS = 0.8
"""A worker that is sent home waits this long for rank 0's own goodbye, which ends the whole group in good order."""


Order = channel.Warmup | channel.Generate | channel.Tokenize | channel.Detokenize | channel.Cancel | channel.Goodbye
"""What a rank that has loaded may be told."""


class Process(Protocol):
    """What this module needs of the engine's process."""

    progress: Progress
    events: Events
    ending: Ending

    def warmed_up(self, second_lane_rows: int | None = None) -> None:
        """Say that the warm-up is done."""


@dataclass(slots=True)
class Formed:
    """The connections of this rank; with Tensor also MLX's group. With them every lost peer is noticed."""

    group: Group
    ring: Any | None
    source: HiddenIn | None = None
    sink: HiddenOut | None = None
    worker: Worker | None = None
    gate: WarmUpGate | None = None


class Server(Protocol):
    """A rank that serves."""

    loaded: channel.Loaded

    def put(self, command: Order) -> None:
        """A command, from the thread that reads them."""

    def run(self) -> None:
        """Serve, in the main thread; returns after a goodbye."""


def connect(command: channel.Connect, process: Process) -> Formed:
    """Form the group of an epoch.

    Raises:
        EngineError: it was not formed by the deadline, or with an error.
    """
    progress, ending = process.progress, process.ending
    former = Former(command, process.events, ending.lose)
    former.listen()
    progress.write(Phase.WAITING)
    tensor = None
    if command.sharding is Sharding.TENSOR:
        # The ring first: rank n-1 is told to connect only once the others' ring ports listen.
        former.announce(*ring.neighbours(command))
        tensor = ring.form(command, ending.lose)
    formed = Formed(former.form(), tensor)
    group = formed.group

    def waiting(peer: int) -> None:
        progress.write(Phase.WAITING, waiting_for=peer)

    def computing() -> None:
        progress.write(Phase.COMPUTING)

    for connection in group.workers.values():
        connection.expect_answer()
    if group.downstream is not None:
        group.downstream.expect_answer()
        formed.sink = HiddenOut(group.downstream, waiting, computing)
    if group.upstream is not None:
        formed.source = HiddenIn(group.upstream, waiting, computing)
    if group.rank > 0:
        formed.gate = WarmUpGate(process.warmed_up)
        formed.worker = Worker(group, progress, ending, formed.gate)
        formed.worker.listen()
    progress.write(Phase.IDLE)
    return formed


def load(command: channel.Load, formed: Formed | None, process: Process) -> Server:
    """Load this rank's shard (and on rank 0 the tokenizer).

    Raises:
        EngineError: the model is missing, damaged, unsupported, or does not fit.
        ValueError: the group is another one than the shard is for.
    """
    group = formed.group if formed else None
    if (group.rank if group else 0, group.world_size if group else 1) != (command.rank, command.world_size):
        raise ValueError(f"Load as rank {command.rank} of {command.world_size} does not fit the group: {group}")
    shard = loading.load(command, formed.ring if formed else None, process.events.send)
    tail = Tail(shard.model)
    if formed is not None and shard.stage is not None:
        compute: Compute = PipelineStage(shard.stage, tail, formed.source, formed.sink)
    else:
        compute = WholeModel(shard.model, tail, leader=command.rank == 0)
    executor = Executor(compute)
    if formed is not None and formed.worker is not None and formed.gate is not None:
        return WorkerServer(shard.loaded, executor, formed.worker, formed.gate, process.ending)
    return LeaderServer(shard, command, executor, group, process)


class WorkerServer:
    """A rank > 0."""

    def __init__(
        self, loaded: channel.Loaded, executor: Executor, worker: Worker, gate: WarmUpGate, ending: Ending
    ) -> None:
        self.loaded = loaded
        self._executor = executor
        self._worker = worker
        self._gate = gate
        self._ending = ending

    def put(self, command: Order) -> None:
        """Warm-up and goodbye; requests are rank 0's."""
        match command:
            case channel.Warmup():
                self._gate.asked()
            case channel.Goodbye():
                timer = threading.Timer(_WORKER_GOODBYE_SECONDS, self._ending.leave)
                timer.daemon = True
                timer.start()
            case _:
                pass

    def run(self) -> None:
        """Serve frames; never returns."""
        self._worker.run(self._executor)


class LeaderServer:
    """Rank 0."""

    def __init__(
        self, shard: loading.Shard, command: channel.Load, executor: Executor, group: Group | None, process: Process
    ) -> None:
        tokenizer = load_tokenizer(Path(command.path), shard.config)
        limits = Limits.of(command, shard.budget.context)
        if limits.context > shard.context_length:
            asked = f"contextLength {limits.context} is more than the model's own {shard.context_length}"
            process.events.notice(f"{asked}: answers beyond it may be nonsense", warning=True)
        self.loaded = shard.loaded
        self._ending = process.ending
        pipelined = command.sharding is Sharding.PIPELINE and group is not None
        ahead, lanes = (_FRAMES_AHEAD, _PIPELINE_LANES) if pipelined else (1, 1)
        scheduler = Scheduler(
            shard.budget.rows,
            tokenizer.eos,
            lanes=lanes,
            ahead=ahead,
            max_tokens=shard.budget.tokens,
            whole_prompts=shard.ends_suffice,
        )
        reuse = _Reuse(shard, command, executor, scheduler, process)
        self._leader = Leader(
            executor,
            scheduler,
            group,
            progress=process.progress,
            emit=self._emit,
            warmed_up=reuse.start,
            ahead=ahead,
            lane_count=lanes,
            max_rows=min(shard.budget.rows, rows_in(shard.budget.tokens)),
        )
        self._requests = Requests(tokenizer, limits, self._leader.put, process.events.send)
        self._requests.start()

    def _emit(self, emissions: list[Emission]) -> None:
        if emissions:
            self._requests.put(emissions)

    def put(self, command: Order) -> None:
        """Requests go to the text thread, the rest to the loop."""
        match command:
            case channel.Generate() | channel.Tokenize() | channel.Detokenize() | channel.Cancel():
                self._requests.put(command)
            case channel.Goodbye():
                self._ending.start_leaving()
                self._leader.put(command)
            case _:
                self._leader.put(command)

    def run(self) -> None:
        """Serve until a goodbye."""
        self._leader.run()


class _Reuse:
    """Turns the prefix cache on, once the warm-up has shown what a position takes."""

    def __init__(
        self,
        shard: loading.Shard,
        command: channel.Load,
        executor: Executor,
        scheduler: Scheduler,
        process: Process,
    ) -> None:
        self._shard = shard
        self._command = command
        self._executor = executor
        self._scheduler = scheduler
        self._process = process

    def start(self, second_lane_rows: int | None) -> None:
        """The warm-up is done: what prompts have in common is reused from now on, where that is possible."""
        if second_lane_rows is not None:
            self._process.events.notice(f"two lanes from {second_lane_rows} requests on")
        size = self._shard.prompt_cache_bytes
        if size == 0:
            self._process.events.notice("prompts are not reused: promptCacheBytes is 0")
        elif not self._executor.reusable:
            self._process.events.notice("prompts are not reused: layers of this model keep a window or a state")
        else:
            capacity = size // self._largest_position()
            self._scheduler.prefixes.resize(capacity)
            self._process.events.notice(f"prompts are reused: up to {capacity} tokens in {size} bytes on each rank")
        self._process.warmed_up(second_lane_rows)

    def _largest_position(self) -> int:
        """Bytes of one position on the rank that holds most: the smallest room decides for all."""
        here = self._executor.position_bytes
        span, ranks = self._shard.span, self._command.world_size
        if ranks == 1 or self._command.sharding is Sharding.TENSOR:
            return here
        return -(-here * pipeline.largest(span.total, ranks, self._command.memory_limits) // (span.end - span.start))
