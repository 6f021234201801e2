"""From every state a good one is reached once faults end; over the graph of moves that are no faults.

Three questions, from the plain to the fine:

- Does anything rest outside a good state? (Nothing can happen any more, whatever time passes.)
- Is there a state from which no good one can be reached?
- Is there a circle that leaves the good states, or never enters one, and that a fair run can stay in for ever? Fair:
  what could be done at every moment is done at some time. So a run can stay if everybody who always has a move in the
  circle has one that stays there.
"""

from array import array
from collections.abc import Iterator

from .explore import Graph, ViolationError, follow, good, violation, way

RESTS = "nothing can happen any more, and it is no good state"
UNREACHABLE = "no good state can be reached from here"
CIRCLES = "it can go round for ever without being good"
ROUND = "and from here round and round:"


def check(graph: Graph) -> int:
    """The number of good states.

    Raises:
        ViolationError: a good state is not reached; with the way there, and round the circle.
    """
    fine = bytearray(good(graph.world, state) for state in graph.states)
    for number in range(len(graph.states)):
        if not fine[number] and not graph.from_state(number):
            raise violation(graph, RESTS, number)
    reaches = _backwards(graph, fine)
    lost = reaches.find(0)
    if lost >= 0:
        raise violation(graph, UNREACHABLE, lost)
    for circle in _circles(graph):
        if not all(fine[number] for number in circle) and _fair(graph, circle):
            raise ViolationError(CIRCLES, _told(graph, circle), graph)
    return sum(fine)


def _backwards(graph: Graph, fine: bytearray) -> bytearray:
    """Which states can reach a good one."""
    count = len(graph.states)
    begin = array("q", [0]) * (count + 2)
    for target in graph.targets:
        begin[target + 2] += 1
    for number in range(2, count + 2):
        begin[number] += begin[number - 1]
    sources = array("q", [0]) * len(graph.targets)
    for number in range(count):
        for index in graph.from_state(number):
            target = graph.targets[index]
            sources[begin[target + 1]] = number
            begin[target + 1] += 1
    reaches = bytearray(fine)
    stack = [number for number in range(count) if fine[number]]
    while stack:
        target = stack.pop()
        for index in range(begin[target], begin[target + 1]):
            source = sources[index]
            if not reaches[source]:
                reaches[source] = 1
                stack.append(source)
    return reaches


def _circles(graph: Graph) -> Iterator[list[int]]:
    """Strongly connected components with more than one state (Tarjan, without recursion)."""
    count = len(graph.states)
    order, low, on = array("q", [-1]) * count, array("q", [0]) * count, bytearray(count)
    seen, path = 0, []
    for root in range(count):
        if order[root] >= 0:
            continue
        work = [(root, graph.first[root])]
        order[root] = low[root] = seen
        seen += 1
        path.append(root)
        on[root] = 1
        while work:
            number, index = work[-1]
            if index < graph.first[number + 1]:
                work[-1] = (number, index + 1)
                target = graph.targets[index]
                if order[target] < 0:
                    order[target] = low[target] = seen
                    seen += 1
                    path.append(target)
                    on[target] = 1
                    work.append((target, graph.first[target]))
                elif on[target]:
                    low[number] = min(low[number], order[target])
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[number])
            if low[number] == order[number]:
                members: list[int] = []
                while not members or members[-1] != number:
                    members.append(path.pop())
                    on[members[-1]] = 0
                if len(members) > 1:
                    yield members


def _fair(graph: Graph, circle: list[int]) -> bool:
    """Whether a fair run can stay in it."""
    inside = set(circle)
    always: set[int] | None = None
    stays: set[int] = set()
    for number in circle:
        can = set()
        for index in graph.from_state(number):
            can.add(graph.actors[index])
            if graph.targets[index] in inside:
                stays.add(graph.actors[index])
        always = can if always is None else always & can
    return (always or set()) <= stays


def _told(graph: Graph, circle: list[int]) -> list[str]:
    """The way to the circle, and once round."""
    start, inside = min(circle), set(circle)
    parents, queue = {start: start}, [start]
    for number in queue:
        for index in graph.from_state(number):
            target = graph.targets[index]
            if target == start and number != start:
                once = [number]
                while once[-1] != start:
                    once.append(parents[once[-1]])
                there = way(graph, start)
                words, _ = follow(graph, [*there, *once[-2::-1], start])
                return [*words[: len(there) - 1], ROUND, *words[len(there) - 1 :]]
            if target in inside and target not in parents:
                parents[target] = number
                queue.append(target)
    raise AssertionError("a circle does not close")
