"""When the second lane of a pipeline opens: found out in the warm-up, with whatever group there is."""

import pytest

from mlx_runner.engine import frames
from mlx_runner.engine.lanes import SIZES, crossover
from mlx_runner.engine.scheduler import SECOND_LANE_ROWS, Scheduler, Turn


class Machine:
    """A group in which a step of some rows takes `step(rows)` seconds, on each of two stages."""

    def __init__(self, read: float, row: float) -> None:
        self.read = read
        self.row = row
        self.now = 0.0
        self.largest = 0

    def clock(self) -> float:
        return self.now

    def step(self, rows: int) -> float:
        return self.read + self.row * rows

    def drive(self, scheduler: Scheduler) -> None:
        busy = [0.0, 0.0]
        """Until when the first and the second stage compute."""
        planned: list[Turn] = []
        while True:
            while len(planned) < 2 and (turn := scheduler.plan()):
                planned.append(turn)
            if not planned:
                break
            turn = planned.pop(0)
            last = turn.operations[-1]
            if not isinstance(last, frames.Step | frames.FirstStep):
                continue
            self.largest = max(self.largest, len(last.tokens))
            took = self.step(len(last.tokens))
            lanes_wait = 0.0 if planned else max(busy)
            busy[0] = max(busy[0], lanes_wait) + took
            busy[1] = max(busy[1], busy[0]) + took
            scheduler.take(turn.lane, [1] * len(last.tokens))
        self.now += max(busy)


def test_where_rows_cost_little_beside_the_weights_one_lane_is_kept() -> None:
    machine = Machine(read=0.001, row=0.0)
    assert crossover(machine.drive, 16, 4, machine.clock) > 16


def test_where_rows_are_all_that_costs_two_lanes_are_used_from_few_requests_on() -> None:
    machine = Machine(read=0.0, row=0.0001)
    assert crossover(machine.drive, 64, 4, machine.clock) == SIZES[0]


def test_slow_steps_leave_it_where_it_usually_pays() -> None:
    machine = Machine(read=2.0, row=0.0)
    assert crossover(machine.drive, 64, 4, machine.clock) == SECOND_LANE_ROWS
    assert machine.now < 30


@pytest.mark.parametrize("places", [1, 3, 4, 20])
def test_no_more_requests_are_tried_than_there_is_room_for(places: int) -> None:
    machine = Machine(read=0.001, row=0.0)
    assert crossover(machine.drive, places, 4, machine.clock) >= SECOND_LANE_ROWS
    assert machine.largest <= places
