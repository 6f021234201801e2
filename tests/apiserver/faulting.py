"""What every test of a fault asserts where the operator tells it: condition, time, and the text of `kubectl describe`.

The texts stand in `golden/`, one for each row, and are the place where wording is reviewed. `UPDATE_GOLDEN=1` writes
them anew.
"""

import asyncio
import difflib
import os
import re
import time
from typing import Any

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.runner import RunnerState
from tests.apiserver.crd.kubectl import Kubectl
from tests.apiserver.harness import Manifest, World, condition, eventually, is_ready
from tests.faults import PATIENCE, Fault

UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
QUIET_SECONDS = 7.0
"""After this without a write by the operator a text is written: news that can wait are written after 5 s."""
SAME_SECONDS = 40.0
"""How long a busy machine may take to come to rest."""
LONGEST_SECONDS = 120.0
LONG = {"backoff": {"initial": "1h", "max": "1h"}}
"""`spec.restartPolicy` of an instance that is looked at while it waits for its restart."""
_NORMAL: tuple[tuple[str, str], ...] = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "YYYY-MM-DDTHH:MM:SSZ"),
    (r"\b\d\d:\d\d:\d\dZ", "HH:MM:SSZ"),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "UID"),
    (r"\(uid [0-9a-f]{8}\)", "(uid UID)"),
    (r"(Resource Version|Incarnation|Spec Hash|Template Hash):( +)\S+", r"\1:\2…"),
    (r"\b127(\.\d+){3}:\d{5}\b", "IP:PORT"),
    (r"\b127(\.\d+){3}\b", "IP"),
    (r"\bpid \d+", "pid N"),
    (r"\d+\.\d+ s\b", "N s"),
    (r"\b(no step for|state T for|last progress) \d+ s", r"\1 N s"),
    (r"\bstep \d+", "step N"),
)
"""What differs from run to run, and what stands for it."""
_WAITED = r"(connection to rank \d+ closed|not connected within .*: still waiting for rank \d+), in Runner\w+"
_CONSEQUENCE = re.compile(rf"RunnerShutdown \(consequence\)(, layers \d+-\d+)?|RunnerFailed \(consequence\), {_WAITED}")
"""What the line of a rank that was taken along says."""
_LOST = re.compile(rf"^      Message: rank \d+/.*: {_WAITED}$\n      Reason: (PeerLost|ConnectTimeout)$", re.MULTILINE)
_EVENT = re.compile(r"^  (Normal|Warning) +(\S+) +(\S+ \(x\d+ over \S+\)|\S+) +(\S+) +(.*)$", re.MULTILINE)


async def seen(place: World, row: Fault, *, since: float, name: str = "tiny") -> Manifest:
    """The fault is told as the row says, in time, and `kubectl describe` shows the row's text. Returns the instance.

    Args:
        place: where it was injected. What is looked at must come to rest: hold a pod, or let the restart be far off.
        row: what is expected.
        since: when it was injected, by `time.monotonic()`.
        name: of the instance.
    """

    def told(instance: Manifest) -> bool:
        found = condition(instance, row.condition)
        return found.get("reason") == row.reason and row.pattern.fullmatch(found["message"]) is not None

    what = f"{row.id}: {row.condition} says {row.reason}: {row.says!r}"
    # Of a deadline of minutes the test has a shorter one.
    patience = min(PATIENCE * row.within, LONGEST_SECONDS) if row.within is not None else LONGEST_SECONDS
    instance = await place.until(told, what, name=name, seconds=patience)
    row.took(time.monotonic() - since)
    if row.state is not None and row.rank is not None:
        failure = instance["status"]["runners"][row.rank]["lastFailure"]
        assert failure["state"] == row.state, (row.id, failure)
    await _shown(place, row, name)
    return await place.get(name)


async def _shown(place: World, row: Fault, name: str) -> None:
    """The text comes to be the golden one; what differs at the end is in the failure."""
    # kubectl costs more than to look at the audit log.
    await place.settled(QUIET_SECONDS if UPDATE else 0.3)
    if UPDATE:
        row.golden.parent.mkdir(exist_ok=True)
        row.golden.write_text(await describe(place, name))
    golden, last = row.golden.read_text(), ""

    async def same() -> bool:
        nonlocal last
        if last:
            await asyncio.sleep(0.3)
        last = await describe(place, name)
        return settled(last) == settled(golden)

    try:
        await eventually(same, "the text is the golden one", SAME_SECONDS)
    except AssertionError:
        lines = difflib.unified_diff(golden.splitlines(), last.splitlines(), row.golden.name, "seen", lineterm="")
        raise AssertionError("\n".join(["UPDATE_GOLDEN=1 writes what is seen:", *lines])) from None


async def describe(place: World, name: str = "tiny") -> str:
    """What `kubectl describe mi` prints, without what differs from run to run."""
    kubectl = Kubectl(place.server.binaries / "kubectl", place.server.kubeconfig)
    text = await asyncio.to_thread(kubectl.run, "describe", "modelinstance", name, "-n", place.namespace)
    return normal(text.replace(str(place.kubelet.folder / "models"), names.MODEL_MOUNT), place.namespace)


def normal(text: str, namespace: str) -> str:
    """A text of `kubectl describe` without times, uids and other random parts."""
    text = re.sub(rf"\b{namespace}\b", "default", text)
    for pattern, shown in _NORMAL:
        text = re.sub(pattern, shown, text)
    # Its columns are as wide as the ages are long.
    text = _EVENT.sub(lambda e: f"  {e[1]:<7}  {e[2]:<24}  {e[5]}", text)
    text = re.sub(r"\n  Type +Reason +Age +From +Message\n  [- ]+", "", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def settled(text: str) -> str:
    """A text of `kubectl describe` without what depends on who was quicker.

    A rank that was taken along is shut down by the operator, or tells of its lost peer first: to make that certain, the
    operator would have to leave engines running for as long as a peer may take to notice, and the restart would wait
    for it. So a text may show either, and nothing else; how far the rank was counts where the group had been Ready.
    """
    ranks = set(re.findall(r"^    rank (\d+)/.* \(consequence\)", text, re.MULTILINE))
    text = re.sub(r"^(    rank \d+/.*: )(\S+ \(consequence\).*)$", _either, text, flags=re.MULTILINE)
    ready = re.search(r"^  Normal +Ready ", text, re.MULTILINE) is not None
    head, runners, rest = text.partition("\n  Runners:\n")
    entries, more, tail = rest.partition("\n  Runners Ready:")
    parts = re.split(r"^(?=    Epoch:)", entries + "\n", flags=re.MULTILINE)
    kept = (_unhurried(part, ready=ready) if (_rank_of(part) in ranks) else part for part in parts)
    return head + runners + "".join(kept) + more + tail


def _rank_of(entry: str) -> str:
    found = re.search(r"^    Rank: +(\d+)$", entry, re.MULTILINE)
    return found[1] if found else ""


def _either(line: re.Match[str]) -> str:
    """A rank's line of the brief, where it says one of the two things that a consequence may say."""
    return f"{line[1]}(consequence)" if _CONSEQUENCE.fullmatch(line[2]) else line[0]


def _unhurried(entry: str, *, ready: bool) -> str:
    """An entry of `status.runners` without how its rank ended, if that is one of the two ways."""
    entry = re.sub(r": +", ": ", entry)  # as wide as the longest name
    failure = re.search(r"^    Last Failure:\n(      .*\n)+", entry, re.MULTILINE)
    state = re.search(r"^    State: (\w+)$", entry, re.MULTILINE)
    shut_down = failure is None and state is not None and state[1] == RunnerState.SHUTDOWN
    lost = failure is not None and state is not None and state[1] == RunnerState.FAILED
    if not shut_down and not (failure is not None and lost and _LOST.search(failure[0])):
        return entry
    entry = entry.replace(failure[0], "") if failure is not None else entry
    dropped = "Progress|State" if ready else "Progress|State|Layers"
    return re.sub(rf"^    ({dropped}): .*\n", "", entry, flags=re.MULTILINE)


async def started(place: World, row: Fault, *, hold: str = "", **spec: Any) -> None:
    """Create the instance that a row needs; its next failure leaves time to look at it.

    Args:
        place: where.
        row: what it is for.
        hold: the command at which the engine of the row's rank stops, until the kubelet's plan changes.
        spec: of the instance.
    """
    place.kubelet.plan(**({"hold": hold, "rank": row.rank} if hold else {}))
    await place.create(**{"runners": row.ranks, "sharding": row.sharding, "restartPolicy": LONG, **spec})
    await failed_before(place)
    if not hold:
        await place.until_ready()


async def failed_before(place: World, name: str = "tiny") -> None:
    """As if the group had failed once of late: the next restart waits for its back-off, the first would be at once."""
    await place.until(lambda i: i.get("status", {}).get("epoch", 0) > 0, "an epoch is in status", name=name)
    await place.kube.merge_patch(INSTANCES, place.namespace, name, {"status": {"restarts": 1}}, subresource="status")


async def in_state(place: World, row: Fault, state: RunnerState, seconds: float = 60.0) -> None:
    """The row's rank is in a state, by its own report, and the others have nothing left to do."""

    async def reached() -> bool:
        reports = [place.kubelet.report(f"tiny-{rank}") for rank in range(row.ranks)]
        return reports[row.rank or 0].get("state") == state

    await eventually(reached, f"rank {row.rank} is {state}", seconds)
    await place.settled(0.5)


async def comes_back(place: World, name: str = "tiny") -> None:
    """Once nothing is in the way and the back-off is over, the group is Ready again by itself, in the same pods."""
    place.kubelet.plan()
    before, pods = await place.get(name), await _uids(place)
    if "nextRestartAt" in before["status"]:
        over = {"status": {"nextRestartAt": before["metadata"]["creationTimestamp"]}}
        await place.kube.merge_patch(INSTANCES, place.namespace, name, over, subresource="status")
    await place.until(well, "Ready again by itself", name=name)
    assert await _uids(place) == pods


async def stays_until_asked(place: World, name: str = "tiny") -> None:
    """Once nothing is in the way, the annotation `mlx-operator.dev/retry` makes the group Ready again."""
    place.kubelet.plan()
    stalled = condition(await place.get(name), ConditionType.STALLED)
    assert stalled["status"] == "True", stalled
    body = {"metadata": {"annotations": {"mlx-operator.dev/retry": "again"}}}
    await place.kube.merge_patch(INSTANCES, place.namespace, name, body)
    await place.until(well, "Ready again when asked", name=name)


def well(instance: Manifest) -> bool:
    """Ready, and nothing failed any more."""
    return is_ready(instance) and condition(instance, ConditionType.RUNNER_FAILED)["status"] == "False"


async def _uids(place: World) -> set[str]:
    return {pod["metadata"]["uid"] for pod in await place.pods()}
