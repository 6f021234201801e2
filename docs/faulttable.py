"""docs/faults.md: what can go wrong and what is told of it, from the rows that the tests of these faults declare."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from docs import chaostable
from tests.faults import Fault, Layer, declared

ROOT = Path(__file__).resolve().parents[1]

_HEAD = """\
# Faults

Generated from the tests `tests/*/test_fault*.py`, which inject each of these faults and assert what stands here: do not
edit.

*Reported* is the state in which the rank that is the cause failed, the reason and the message (`…` is any text). Where
the others report `PeerLost`, the operator's own rules are applied to the reports of all ranks and name the same cause.
*Within* is from the fault to the report, with the default deadlines; a test accepts three times that on a busy machine
and prints what it measured. Where a deadline of `spec.deadlines` is the bound, the test uses a shorter one. After each
fault of a runner the next epoch answers, in the same pods, and no process of the old one is left.

*Condition* is where the operator tells it, with reason and message. *Describe* is the whole text of
`kubectl describe mi` at that moment, which the test compares (times, uids and other random parts left out).
"""
_COLUMNS = ("Fault", "Injected by", "Ranks", "Reported", "The other ranks", "Within", "Goes on")
_SEEN = ("Fault", "Injected by", "Ranks", "Condition", "Within", "Goes on", "Describe")
_TITLES = {
    Layer.GROUP: "Runners: real supervisors, real engines",
    Layer.STAND_IN: "Supervisors, with a stand-in for the engine",
    Layer.ENGINES: "Engines, in networks of their own",
    Layer.OPERATOR: "The operator, on a real API server",
    Layer.CLUSTER: "A cluster of two nodes",
}


def text() -> str:
    """The page."""
    rows = sorted(declared(), key=lambda row: list(Layer).index(row.layer))
    lines = [_HEAD.rstrip("\n")]
    for layer, group in groupby(rows, key=lambda row: row.layer):
        lines += ["", f"## {_TITLES[layer]}", ""]
        lines += _table(list(group))
    lines += ["", *chaostable.lines()]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Fault]) -> Iterator[str]:
    told = _told if rows[0].layer is Layer.OPERATOR else _reports
    columns = _SEEN if rows[0].layer is Layer.OPERATOR else _COLUMNS
    yield "| " + " | ".join(columns) + " |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in told(row)) + " |"


def _reports(row: Fault) -> tuple[str, ...]:
    return row.what, row.injected, _ranks(row), _reported(row), _others(row), _within(row), row.recovery


def _told(row: Fault) -> tuple[str, ...]:
    says = f": {row.says}" if row.says else ""
    condition = f"`{row.condition}`, `{row.reason}`{says}"
    return row.what, row.injected, _ranks(row), condition, _within(row), row.recovery, f"[{row.id}]({link(row)})"


def link(row: Fault) -> str:
    """Where a page of docs/ finds the text of describe."""
    return f"../{row.golden.relative_to(ROOT)}"


def _ranks(row: Fault) -> str:
    return f"{row.ranks}, {row.sharding}" if row.ranks > 1 else "1"


def _within(row: Fault) -> str:
    return f"{row.within:g} s" if row.within is not None else ""


def _reported(row: Fault) -> str:
    if row.reason is None:
        return "nothing"
    who = row.who or ("each rank" if row.rank is None else f"rank {row.rank}")
    where = f" in {row.state}" if row.state else ""
    says = f": {row.says}" if row.says else ""
    return f"{who}, `{row.reason}`{where}{says}"


def _others(row: Fault) -> str:
    if row.reason is None or row.ranks == 1 or row.rank is None:
        return ""
    return f"`{row.others}`" if row.others else "shut down by the operator"
