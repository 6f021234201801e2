"""Work that mostly waits, done side by side; each piece is a test of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

import pytest

T = TypeVar("T")
AT_ONCE = 4


class Outcomes(Generic[T]):
    """What became of each piece."""

    def __init__(self, found: Mapping[str, T | BaseException]) -> None:
        self._found = found

    def of(self, key: str) -> T:
        """The result of a piece, or what it raised."""
        outcome = self._found[key]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def side_by_side(works: Mapping[str, Callable[[], Awaitable[T]]], at_once: int = AT_ONCE) -> Outcomes[T]:
    """Do all, so many at once, in the order given; one that fails does not keep the others from ending."""

    async def everything() -> list[T | BaseException]:
        places = asyncio.Semaphore(at_once)

        async def one(work: Callable[[], Awaitable[T]]) -> T:
            async with places:
                return await work()

        return await asyncio.gather(*(one(work) for work in works.values()), return_exceptions=True)

    return Outcomes(dict(zip(works, asyncio.run(everything()), strict=True)))


def chosen(request: pytest.FixtureRequest, name: str) -> list[object]:
    """The values of a parameter for which tests of this module were chosen (`-k`, or all)."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    mine = [item for item in items if item.module is request.module]
    return [item.callspec.params[name] for item in mine if hasattr(item, "callspec") and name in item.callspec.params]
