"""What one engine measured, kept for the next one: a restart does not measure it again.

It lives as long as this process. What it was measured of may have changed meanwhile in ways that nobody sees here (a
peer's pod on another node): then it is as good a guess as any, and costs speed at most.
"""

from mlx_runner import channel


class Tuning:
    """From how many requests on a second lane pays (`engine.lanes`), for one piece of work at a time."""

    def __init__(self) -> None:
        self._work: channel.Load | None = None
        self._second_lane_rows: int | None = None

    def learn(self, load: channel.Load, found: int | None) -> None:
        """An engine that was told to `load` found this in its warm-up; None: nothing."""
        self._work, self._second_lane_rows = _work(load), found

    def known(self, load: channel.Load) -> int | None:
        """What the last engine found, if it did the same work; None: to be measured."""
        return self._second_lane_rows if self._work == _work(load) else None


def _work(load: channel.Load) -> channel.Load:
    """A spare may stand beside one engine and not beside the next: that changes nothing about the work."""
    return load.model_copy(update={"spare_bytes": 0})
