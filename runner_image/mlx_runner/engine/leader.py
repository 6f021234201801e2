"""Rank 0: decides every turn of the group, sends it to the other ranks, and computes its own part.

A frame is sent before this rank computes its own part: the first stage of a pipeline then works at the same time.
With two lanes the frame of the one is sent before this rank computes that of the other: both stages have work.
"""

import queue
import time
from collections import deque
from collections.abc import Callable

from mlx_runner.channel import Goodbye, Warmup
from mlx_runner.progress import Phase, Progress

from . import frames, lanes
from .forward import Executor
from .frames import Frame
from .group import Group
from .requests import CancelRow
from .sampler import sample
from .scheduler import Emission, Row, Scheduler

_WARM_UP_UID = 0
_WARM_UP_PROMPT = (0,) * 8
_WARM_UP_TOKENS = 3
_CLEAR_AFTER_SECONDS = 1.0
"""Without work for this long, freed memory is given back: not between two requests of a busy client."""
_GOODBYE_SECONDS = 0.8
"""For the other ranks to take their leave; the supervisor waits 1 s."""

Message = Row | CancelRow | Warmup | Goodbye


class Leader:
    """The loop of rank 0's main thread. Everything it has to know comes through `put`.

    `ahead`: frames under way at a time, where none waits for the result of another.
    `lane_count`, `max_rows`: of the scheduler; where it has two lanes the warm-up finds out when to use the second,
    unless it was told.
    `warmed_up`: told from how many requests on that is; None where there is one lane.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        group: Group | None,
        *,
        progress: Progress,
        emit: Callable[[list[Emission]], None],
        warmed_up: Callable[[int | None], None],
        ahead: int,
        lane_count: int = 1,
        max_rows: int = 1,
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._epoch = group.epoch if group else 0
        self._workers = list(group.workers.values()) if group else []
        self._progress = progress
        self._emit = emit
        self._warmed_up = warmed_up
        self._ahead = ahead
        self._lane_count = lane_count
        self._max_rows = max_rows
        self._second_lane_rows: int | None = None
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._planned: deque[Frame] = deque()
        self._sequence = 0
        self._goodbye = False
        self._cleared = True

    def put(self, message: Message) -> None:
        """Tell the loop something; from any thread."""
        self._inbox.put(message)

    def run(self) -> None:
        """Serve until a goodbye; then the other ranks have been told, and this process may end."""
        while not self._goodbye:
            self._read()
            self._plan(self._scheduler)
            if self._planned:
                self._give(self._turn(self._planned.popleft(), self._scheduler))
            elif not self._goodbye:
                self._rest()
        self._leave()

    def _read(self) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, message: Message) -> None:
        match message:
            case Row():
                self._scheduler.submit(message)
            case CancelRow(uid):
                self._give(self._scheduler.cancel(uid))
            case Warmup():
                self._second_lane_rows = message.second_lane_rows
                self._scheduler.submit(_warm_up())
            case Goodbye():
                self._goodbye = True

    def _plan(self, scheduler: Scheduler) -> None:
        while len(self._planned) < self._ahead:
            turn = scheduler.plan()
            if turn is None:
                return
            self._planned.append(self._send(*turn.operations, lane=turn.lane))

    def _send(self, *operations: frames.Operation, lane: int = 0) -> Frame:
        self._sequence += 1
        frame = Frame(self._epoch, self._sequence, operations, lane)
        if self._workers:
            raw = frames.encode(frame)
            for worker in self._workers:
                worker.send(raw)
        return frame

    def _turn(self, frame: Frame, scheduler: Scheduler) -> list[Emission]:
        self._cleared = False
        self._progress.write(Phase.COMPUTING)
        logits = self._executor.run(frame)
        self._progress.holds(self._executor.rows, self._executor.cache_bytes)
        if frame.step is None or logits is None:
            self._progress.write(Phase.COMPUTING, steps=1)
            return []
        tokens = sample(logits, [row.sampler for row in scheduler.rows(frame.lane)])
        self._progress.write(Phase.COMPUTING, steps=1, tokens=len(tokens))
        return scheduler.take(frame.lane, tokens)

    def _drive(self, scheduler: Scheduler) -> list[Emission]:
        """Serve all that a scheduler has, to its end."""
        emissions = []
        self._plan(scheduler)
        while self._planned:
            emissions += self._turn(self._planned.popleft(), scheduler)
            self._plan(scheduler)
        return emissions

    def _give(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            if emission.uid == _WARM_UP_UID and emission.finish is not None:
                self._end_warm_up()
        self._emit([emission for emission in emissions if emission.uid != _WARM_UP_UID])

    def _end_warm_up(self) -> None:
        second = None
        if self._lane_count > 1:
            # The row of the warm-up leaves its lane with a frame of its own.
            self._emit(self._drive(self._scheduler))
            second = self._second_lane_rows or lanes.crossover(self._drive, self._max_rows, self._ahead)
            self._scheduler.second_lane_rows = second
        self._send(frames.WarmedUp())
        self._warmed_up(second)

    def _rest(self) -> None:
        """Sleep until there is something to do."""
        self._progress.write(Phase.IDLE)
        if not self._cleared:
            try:
                self._take(self._inbox.get(timeout=_CLEAR_AFTER_SECONDS))
            except queue.Empty:
                self._executor.run(self._send(frames.ClearCache()))
                self._cleared = True
            return
        self._take(self._inbox.get())

    def _leave(self) -> None:
        self._send(frames.Goodbye())
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for worker in self._workers:
            worker.wait_answer(max(0.0, deadline - time.monotonic()))


def _warm_up() -> Row:
    return Row(_WARM_UP_UID, _WARM_UP_PROMPT, _WARM_UP_TOKENS, ignore_eos=True, remember=False)
