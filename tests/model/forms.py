"""Forms of states: epochs counted anew when the group's grows, and mirror images made one.

All ranks but the first are alike, so states that differ only in their order are one state.
"""

from itertools import permutations

from . import normal
from .places import Kind, Places
from .state import Message, Place, State, Tables, View


class Forms:
    """Each form is worked out once."""

    def __init__(self, tables: Tables, places: Places, size: int) -> None:
        self._tables = tables
        self._places = places
        self._size = size
        self._shifted: dict[tuple[int, int, Kind], int] = {}
        self._statuses: dict[tuple[int, tuple[int, ...]], int] = {}
        self._turned: dict[tuple[int, tuple[int, ...], Kind], int] = {}
        self._orders = [(0, *rest) for rest in permutations(range(1, size))][1:]

    def shift(self, place: int, by: int, kind: Kind) -> int:
        """A place with its epochs counted from a later one."""
        if by == 0:
            return place
        key = (place, by, kind)
        if key not in self._shifted:
            self._shifted[key] = self._places.tidy(self._counted(self._tables.places[place], by), kind)
        return self._shifted[key]

    def _counted(self, place: Place, by: int) -> Place:
        def report(number: int) -> int:
            return self._tables.reports.id(normal.report(self._tables.reports[number], by))

        def message(found: Message | None) -> Message | None:
            return found and found._replace(epoch=normal.shifted(found.epoch, by))

        def view(found: View | None) -> View | None:
            return found and found._replace(report=report(found.report))

        process = place.process
        if process is not None:
            engines = tuple(normal.shifted(epoch, by) for epoch in process.engines)
            process = process._replace(report=report(process.report), engines=engines)
        return place._replace(
            process=process,
            view=view(place.view),
            task=message(place.task),
            older=message(place.older),
            words=None if place.words is None else report(place.words),
            zombies=tuple(sorted({normal.shifted(epoch, by) for epoch in place.zombies})),
        )

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """The one of the mirror images that stands for all, and which rank of the given state each of its ranks was."""
        best, chosen = state, tuple(range(self._size))
        for order in self._orders:
            image = self.image(state, order)
            if (image.places, image.status) < (best.places, best.status):
                best, chosen = image, order
        return best, chosen

    def image(self, state: State, order: tuple[int, ...]) -> State:
        """Rank i of the image is rank order[i] of the state."""
        new = tuple(order.index(rank) for rank in range(self._size))
        key = (state.status, new)
        if key not in self._statuses:
            turned = normal.status(self._tables.statuses[state.status], order=new)
            self._statuses[key] = self._tables.statuses.id(turned)
        places = tuple(self._turn(state.places[rank], new, Kind(rank == 0, not state.faults)) for rank in order)
        return state._replace(status=self._statuses[key], places=places)

    def _turn(self, place: int, new: tuple[int, ...], kind: Kind) -> int:
        key = (place, new, kind)
        if key not in self._turned:
            found = self._tables.places[place]

            def report(number: int) -> int:
                return self._tables.reports.id(normal.report(self._tables.reports[number], order=new))

            process, view = found.process, found.view
            turned = found._replace(
                process=process and process._replace(report=report(process.report)),
                view=view and view._replace(report=report(view.report)),
                words=None if found.words is None else report(found.words),
            )
            self._turned[key] = self._places.tidy(turned, kind)
        return self._turned[key]
