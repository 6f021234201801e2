"""The rows of the fault matrix and what belongs to them."""

import re
from collections import Counter

from mlx_operator_api.conditions import Reason
from tests.apiserver.faulting import settled
from tests.faults import GOLDEN, Layer, declared

OPERATOR = [row for row in declared() if row.layer is Layer.OPERATOR]


def test_no_two_faults_have_one_name() -> None:
    assert [name for name, times in Counter(row.id for row in declared()).items() if times > 1] == []


def test_every_fault_that_the_operator_tells_has_its_text_of_describe_and_no_text_is_left_over() -> None:
    assert sorted(path.name for path in GOLDEN.glob("*")) == sorted(row.golden.name for row in OPERATOR)


def test_every_fault_that_the_operator_tells_has_words_and_a_bound() -> None:
    assert [row.id for row in OPERATOR if not row.reason or not row.says.strip("… ") or row.within is None] == []


def test_every_reason_of_a_failure_has_a_fault_that_the_operator_tells() -> None:
    """The reasons before it are steps of the lifecycle, not failures."""
    failures = list(Reason)[Reason.INVALID_SPEC.ordinal :]
    assert sorted(set(failures) - {row.reason for row in OPERATOR}) == []


LOST = """    Last Failure:
      Epoch:    1
      Message:  rank 0/2 pod tiny-0 on node n1: connection to rank 1 closed, in RunnerReady
      Reason:   PeerLost
      State:    RunnerReady
      Time:     YYYY-MM-DDTHH:MM:SSZ
"""


def ended(state: str, brief: str, failure: str = "", layers: str = "2-3") -> str:
    """A text of a killed rank 1, with rank 0 as it may have ended."""
    text = (GOLDEN / "engine-killed-idle.txt").read_text()
    text, lines = re.subn(r"^(    rank 0/2 .*?: ).*$", rf"\g<1>{state} {brief}", text, flags=re.MULTILINE)
    head, runners, rest = text.partition("\n  Runners:\n")
    tail = rest[rest.index("\n    Epoch:") + 1 :]
    entry = f"    Epoch:  1\n{failure}    Layers:  {layers}\n    Rank:  0\n    State:  {state}\n"
    assert (lines, tail.count("    Rank:")) == (1, 1)
    return head + runners + entry + tail


def test_a_text_may_show_a_consequence_in_either_of_two_ways_and_in_no_other() -> None:
    closed = "(consequence), connection to rank 1 closed, in RunnerReady"
    lost, shut_down = ended("RunnerFailed", closed, LOST), ended("RunnerShutdown", "(consequence), layers 2-3")
    assert lost != shut_down
    assert settled(lost) == settled(shut_down)
    others = (
        ended("RunnerFailed", closed),
        ended("RunnerShutdown", "(consequence), layers 2-3", LOST),
        ended("RunnerFailed", "(consequence), engine exited with code 1", LOST),
        ended("RunnerFailed", closed, LOST.replace("PeerLost", "EngineCrashed")),
        ended("RunnerReady", "(consequence), layers 2-3"),
        ended("RunnerShutdown", ", layers 2-3"),
        ended("RunnerShutdown", "(consequence), layers 2-3", layers="1-3"),
        lost.replace("EngineCrashed on rank 1", "EngineCrashed on rank 0"),
        lost.replace("Normal   ModelLoaded", "Normal   ModelVerified"),
    )
    assert len({settled(text) for text in (lost, *others)}) == 1 + len(others)
