"""The part of docs/faults.md about the API server, from the rows that `tests/chaos` injects."""

from collections.abc import Iterator

from mlx_operator_api.conditions import Reason
from tests.chaos.faults import BY_HAND, FAULTS, ApiFault
from tests.chaos.stage import BUSIEST

_TITLE = "## The API server, and the way to it"
_HEAD = f"""\
Injected by `make test-chaos`, through a proxy between the operator and a real API server, or by what is done to that
server. Each begins when a group of two serves; the group fails meanwhile, and a second instance is created. For each
row the test asserts that the failure is in status, once, with its cause; that no pod, no task and no engine was made
twice (by the audit log, the supervisors' logs and the process table); that no operator sent more than {BUSIEST}
requests in 2 s; and that all is Ready *within* so many seconds of the fault's end (a test accepts three times that on a
busy machine). None needs anybody. Requests of the Lease are left alone where requests are refused, held or slow: a
leader that cannot renew it ends itself, which has tests of its own (two replicas).
"""
_COLUMNS = ("Fault", "Injected by", "Lasts", "The group meanwhile", "Within", "The operator")
_FAILURES = {Reason.ENGINE_CRASHED: "an engine is killed", Reason.POD_DELETED: "a pod is deleted"}


def lines() -> Iterator[str]:
    """The section."""
    yield _TITLE
    yield ""
    yield from _HEAD.splitlines()
    yield ""
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "| " + " | ".join("---" for _ in _COLUMNS) + " |"
    for row in (*FAULTS, *BY_HAND):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |"
    yield ""
    yield 'By hand only, because of its length: `make soak ARGS="--fault outage-2m"`.'


def _cells(row: ApiFault) -> tuple[str, ...]:
    operator = "the process goes on" if row.outlived else "its process may end, and is started again"
    return row.what, row.injected, f"{row.seconds:g} s", _FAILURES[row.reason], f"{row.within:g} s", operator
