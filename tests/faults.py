"""The faults that tests inject, each a row of a table: what is reported, on which rank, how soon, and who heals it.

A test declares its rows by `@fault(...)`, runs once for each, and asserts what the row says. docs/faults.md is made of
the same rows without running anything, so what the page claims is what the tests check.
"""

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import Sharding

PATIENCE = 3.0
"""A busy machine may take so many times the bound before a test fails; what was measured is printed."""
GOLDEN = Path(__file__).parent / "apiserver" / "golden"


class Layer(StrEnum):
    """What of a test is real."""

    GROUP = "supervisors and engines"
    STAND_IN = "supervisors with a stand-in engine"
    ENGINES = "engines"
    OPERATOR = "the operator on an API server"
    CLUSTER = "a cluster of two nodes"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row. `…` in `says` stands for any text."""

    id: str
    what: str
    injected: str
    layer: Layer
    state: RunnerState | None
    """Of the rank that is the cause, when it happens; None: of no rank in particular."""
    reason: Reason | None
    """None: nothing fails."""
    says: str = ""
    """Message of the cause, whole; in the operator's layer: of the condition."""
    condition: ConditionType = ConditionType.RUNNER_FAILED
    """Where the operator tells it."""
    ranks: int = 2
    sharding: Sharding = Sharding.PIPELINE
    rank: int | None = 1
    """The cause; None: every rank reports the same of its own."""
    who: str = ""
    """The cause in words, where it has no fixed rank."""
    others: Reason | None = Reason.PEER_LOST
    """What the others report, as a consequence."""
    within: float | None = None
    """Seconds from the fault to the report, with the default deadlines."""
    then: str = ""
    """How it goes on, where the reason's own way is not the whole story."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """What the message must match."""
        return re.compile(".*".join(re.escape(part) for part in self.says.split("…")), re.DOTALL)

    def check(self, state: RunnerState | None, reason: Reason, message: str) -> None:
        """Assert what the cause reported."""
        told = f"{self.id}: {state} {reason} {message!r}"
        assert reason is self.reason, told
        assert self.state in (None, state), told
        assert self.pattern.fullmatch(message), f"{told} is not {self.says!r}"

    def took(self, seconds: float) -> None:
        """Print what was measured, and hold it against the bound."""
        print(f"fault {self.id}: reported after {seconds:.2f} s, bound {self.within or '-'} s")
        assert self.within is None or seconds < self.within * PATIENCE, f"{self.id}: {seconds:.1f} s"

    @property
    def golden(self) -> Path:
        """What `kubectl describe` shows of it, for a row of the operator's layer."""
        return GOLDEN / f"{self.id}.txt"

    @property
    def recovery(self) -> str:
        """Whether it heals by itself, or needs whom."""
        return self.then or (RECOVERY[self.reason.retry] if self.reason else "nothing to heal")


RECOVERY = {
    Retry.RESTART: "by itself: the next epoch, in the same pods",
    Retry.FREE: "by itself: the next epoch, free of budget",
    Retry.NEVER: "the user: nothing is tried again before that",
    Retry.WAIT: "by itself, once what is missing is there",
    Retry.NONE: "nothing to heal",
}

_rows: dict[str, dict[str, Fault]] = {}
"""By module and id."""


def declare(*rows: Fault, frames: int = 1) -> tuple[Fault, ...]:
    """Rows of a test that injects them one after the other."""
    mine = _rows.setdefault(sys._getframe(frames).f_globals["__name__"], {})
    mine.update({row.id: row for row in rows})
    return rows


def fault(*rows: Fault) -> pytest.MarkDecorator:
    """Rows of a test that runs once for each, with the row as its argument `row`."""
    return pytest.mark.parametrize("row", declare(*rows, frames=2), ids=lambda row: row.id)


def declared() -> Iterator[Fault]:
    """Every row of every test module that is named for faults, in the order of the modules."""
    for package in ("tests.runner", "tests.apiserver", "tests.node"):
        for module in sorted(info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)):
            if module.startswith("test_fault"):
                importlib.import_module(f"{package}.{module}")
                yield from _rows[f"{package}.{module}"].values()
