"""How far the download is, said when it changes: the one way from the work to stdout."""

from collections.abc import Callable

from . import result

Say = Callable[[result.Said], None]


class Progress:
    """Bytes that are there, by file; told as percents of what this rank needs."""

    def __init__(self, say: Say, parts: int = 1) -> None:
        """`parts`: how many have to say what they need before there is a whole to tell percents of."""
        self._say = say
        self._parts = parts
        self._sizes: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._told: tuple[int, int] | None = None

    def need(self, sizes: dict[str, int]) -> None:
        """What one of the parts has to do, in bytes by file name."""
        self._sizes |= sizes
        self._parts -= 1
        self._tell()

    def at(self, name: str, done: int) -> None:
        """So many bytes of a file are there."""
        self._done[name] = min(done, self._sizes.get(name, done))
        self._tell()

    def more(self, name: str, count: int) -> None:
        """So many more bytes of a file are there."""
        self.at(name, self._done.get(name, 0) + count)

    def _tell(self) -> None:
        total = sum(self._sizes.values()) if self._parts <= 0 else 0
        done = sum(count for name, count in self._done.items() if name in self._sizes)
        # 100 % is said by the result: until then something is left to verify.
        now = (min(99, done * 100 // total) if total else 0, total)
        if now != self._told:
            self._told = now
            self._say(result.Percent(percent=now[0], total=now[1]))
