"""docs/faults.md: what can go wrong and what is told of it, from the rows that the tests of these faults declare."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from docs import chaostable
from tests.faults import Fault, Layer, declared

_HEAD = """\
# Faults

Generated from the tests `tests/runner/test_fault*.py` and `tests/node/test_fault*.py`, which inject each of these
faults and assert what stands here: do not edit.

*Reported* is the state in which the rank that is the cause failed, the reason and the message (`…` is any text). Where
the others report `PeerLost`, the operator's own rules are applied to the reports of all ranks and name the same cause.
*Within* is from the fault to the report, with the default deadlines; a test accepts three times that on a busy machine
and prints what it measured. Where a deadline of `spec.deadlines` is the bound, the test uses a shorter one. After each
fault of a runner the next epoch answers, in the same pods, and no process of the old one is left.
"""
_COLUMNS = ("Fault", "Injected by", "Ranks", "Reported", "The other ranks", "Within", "Goes on")
_TITLES = {
    Layer.GROUP: "Runners: real supervisors, real engines",
    Layer.STAND_IN: "Supervisors, with a stand-in for the engine",
    Layer.ENGINES: "Engines, in networks of their own",
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
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "| " + " | ".join("---" for _ in _COLUMNS) + " |"
    for row in rows:
        cells = (
            row.what,
            row.injected,
            f"{row.ranks}, {row.sharding}" if row.ranks > 1 else "1",
            _reported(row),
            _others(row),
            f"{row.within:g} s" if row.within is not None else "",
            row.recovery,
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
