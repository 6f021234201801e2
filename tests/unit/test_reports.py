"""Report streams: what becomes of lines, silence, loss and strangers, on a virtual clock."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from mlx_operator.act.resources import INSTANCES, PODS
from mlx_operator.act.runner import RunnerError, RunnerPort, describe
from mlx_operator.decide.observed import RunnerView
from mlx_operator.metrics import Metrics
from mlx_operator.observe.reports import LONGEST_RETRY_SECONDS, ReportStreams
from mlx_operator.observe.runners import Urgency, address, receive
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport
from tests.unit.manifests import NOW, SETTINGS, UID, instance, pod, report

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


class FakeRunner(RunnerPort):
    """Streams what a test puts into `lines`; None ends the stream, an exception breaks it."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.refusals: list[Exception] = []
        self.dialled: list[float] = []
        self.tokens: set[str] = set()

    @asynccontextmanager
    async def reports(self, pod_ip: str, token: str) -> AsyncIterator[AsyncIterator[bytes]]:
        self.dialled.append(asyncio.get_running_loop().time())
        self.tokens.add(token)
        if self.refusals:
            raise self.refusals.pop(0)
        yield self._lines()

    async def _lines(self) -> AsyncIterator[bytes]:
        lines = self.lines
        while (line := await lines.get()) is not None:
            if isinstance(line, Exception):
                raise line
            yield line

    def say(self, said: RunnerReport) -> None:
        self.lines.put_nowait(said.model_dump_json(by_alias=True).encode() + b"\n")


@dataclass
class Scene:
    store: Store = field(default_factory=lambda: Store(SETTINGS))
    runner: FakeRunner = field(default_factory=FakeRunner)
    changes: list[Urgency] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = ReportStreams(
            self.store,
            self.runner,
            token_of=lambda uid: f"token of {uid}",
            changed=self._changed,
            now=lambda: NOW,
            metrics=Metrics(),
        )
        self.store.pod_changed = self.streams.pod_changed
        self.store.put(INSTANCES, instance())

    def _changed(self, key: Key, urgency: Urgency) -> None:
        assert key == Key("default", "tiny")
        self.changes.append(urgency)

    @property
    def view(self) -> RunnerView:
        return self.store.view("pod-0")


def in_namespace(namespace: str, item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "metadata": {**item["metadata"], "namespace": namespace}}


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    await scene.streams.close()


async def test_a_report_of_a_running_pod_is_kept_and_concerns_its_instance(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report(seq=1))
    await asyncio.sleep(0.1)
    assert scene.view.report == report(seq=1)
    assert scene.view.connected
    assert scene.changes == [Urgency.AT_ONCE]
    assert scene.runner.tokens == {"token of 11111111-2222"}


async def test_a_pod_that_does_not_run_is_not_dialled(scene: Scene) -> None:
    scene.store.put(PODS, pod(ip=None))
    await asyncio.sleep(10)
    assert scene.runner.dialled == []


async def test_a_pod_of_another_namespace_with_the_label_of_an_instance_is_not_dialled(scene: Scene) -> None:
    scene.store.put(PODS, in_namespace("attacker", pod()))
    scene.store.put(INSTANCES, in_namespace("attacker", instance(uid="their-own")))
    await asyncio.sleep(10)
    assert scene.runner.dialled == []


@pytest.mark.parametrize("owner", [None, "their-own"])
async def test_a_pod_that_the_instance_does_not_control_is_not_dialled(scene: Scene, owner: str | None) -> None:
    scene.store.put(PODS, pod(owner=owner))
    await asyncio.sleep(10)
    assert scene.runner.dialled == []


async def test_a_pod_whose_instance_becomes_known_later_is_dialled_then_and_left_when_it_goes(scene: Scene) -> None:
    scene.store.remove(INSTANCES, UID, "1")
    scene.store.put(PODS, pod())
    await asyncio.sleep(10)
    assert scene.runner.dialled == []
    scene.store.put(INSTANCES, instance(version=2))
    scene.runner.say(report())
    await asyncio.sleep(0.1)
    assert scene.view.connected
    scene.store.remove(INSTANCES, UID, "3")
    await asyncio.sleep(10)
    assert not scene.view.connected
    assert len(scene.runner.dialled) == 1


async def test_heartbeats_concern_nobody(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    for seq in range(1, 50):
        scene.runner.say(report(seq=seq, steps=seq, active_requests=seq % 3))
    await asyncio.sleep(1)
    assert scene.view.report is not None
    assert scene.view.report.seq == 49
    assert scene.changes == [Urgency.AT_ONCE]


async def test_ready_and_running_that_alternate_are_not_urgent(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report(seq=1, state=RunnerState.READY))
    scene.runner.say(report(seq=2, state=RunnerState.RUNNING))
    scene.runner.say(report(seq=3, state=RunnerState.READY, layers="0-3"))
    await asyncio.sleep(1)
    assert scene.changes == [Urgency.AT_ONCE, Urgency.LAZY, Urgency.AT_ONCE]


async def test_a_lost_stream_is_told_once_and_dialled_again_with_a_back_off(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report(seq=1))
    await asyncio.sleep(0.1)
    scene.runner.refusals = [aiohttp.ClientConnectionError("refused") for _ in range(20)]
    scene.runner.lines.put_nowait(None)
    await asyncio.sleep(20)
    assert not scene.view.connected
    gaps = [after - before for before, after in zip(scene.runner.dialled[1:], scene.runner.dialled[2:], strict=False)]
    assert max(gaps) <= LONGEST_RETRY_SECONDS * 1.2
    assert gaps[0] < 1.0
    # the first report; the end of the stream; why it cannot be opened again, once
    assert scene.changes == [Urgency.AT_ONCE] * 3
    assert scene.view.report == report(seq=1)


async def test_a_changed_pod_is_dialled_at_once(scene: Scene) -> None:
    scene.runner.refusals = [aiohttp.ClientConnectionError("refused") for _ in range(6)]
    scene.store.put(PODS, pod(version=1))
    await asyncio.sleep(3.3)
    scene.runner.refusals = []
    scene.store.put(PODS, pod(version=2))
    scene.runner.say(report())
    await asyncio.sleep(0.01)
    assert scene.view.connected


async def test_an_undecodable_line_is_shown_and_the_stream_goes_on(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report(seq=1))
    scene.runner.lines.put_nowait(b'{"state": "RunnerDancing"}\n')
    scene.runner.lines.put_nowait(b'{"state": "RunnerDancing"}\n')
    await asyncio.sleep(0.1)
    assert scene.view.undecodable
    assert scene.view.error is not None
    assert "cannot be decoded" in scene.view.error
    assert len(scene.view.error) <= 250
    assert scene.view.report == report(seq=1)
    assert scene.changes == [Urgency.AT_ONCE] * 2
    scene.runner.say(report(seq=2))
    await asyncio.sleep(0.1)
    assert not scene.view.undecodable
    assert scene.view.error is None


async def test_a_report_of_another_runner_at_the_address_is_not_believed(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report(instance_uid="somebody-else"))
    await asyncio.sleep(0.1)
    assert scene.view.report is None
    assert not scene.view.connected
    assert scene.view.error is not None
    assert "another runner" in scene.view.error


async def test_a_refused_token_is_shown(scene: Scene) -> None:
    scene.runner.refusals = [RunnerError(401, "HTTP 401: the bearer token is missing or wrong")] * 9
    scene.store.put(PODS, pod())
    await asyncio.sleep(1)
    assert scene.view.error == "HTTP 401: the bearer token is missing or wrong"


async def test_a_token_that_stays_refused_names_the_secret_to_delete(scene: Scene) -> None:
    scene.runner.refusals = [RunnerError(401, "HTTP 401: no")] * 9
    own = {"name": "token", "secret": {"secretName": "tiny-11111111-0123abcd"}}
    scene.store.put(PODS, pod(spec={"nodeName": "n1", "volumes": [{"name": "tmp", "emptyDir": {}}, own]}))
    await asyncio.sleep(5)
    assert scene.view.error is not None
    assert "Secret default/tiny-11111111-0123abcd" in scene.view.error
    assert "delete it and the pods" in scene.view.error
    assert scene.changes == [Urgency.AT_ONCE] * 2
    scene.store.put(PODS, pod(version=2))
    scene.runner.say(report())
    await asyncio.sleep(10)
    assert scene.view.error is None


async def test_a_pod_that_was_made_with_an_earlier_key_names_no_secret(scene: Scene) -> None:
    scene.runner.refusals = [RunnerError(401, "HTTP 401: no")] * 9
    old = {"name": "token", "secret": {"secretName": "tiny-11111111-earlier0"}}
    scene.store.put(PODS, pod(spec={"volumes": [old]}))
    await asyncio.sleep(5)
    assert scene.view.error == "HTTP 401: no"


async def test_a_stream_ends_with_its_pod(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report())
    await asyncio.sleep(0.1)
    dialled = len(scene.runner.dialled)
    scene.store.remove(PODS, "pod-0", "9")
    scene.runner.lines.put_nowait(None)
    await asyncio.sleep(30)
    assert len(scene.runner.dialled) == dialled


async def test_a_container_that_stops_keeps_its_last_report(scene: Scene) -> None:
    scene.store.put(PODS, pod(version=1))
    scene.runner.say(report())
    await asyncio.sleep(0.1)
    scene.store.put(PODS, pod(version=2, ip=None))
    assert not scene.view.connected
    assert scene.view.report == report()
    assert scene.view.error == "the container does not run"


BEFORE, AFTER = "2026-11-23T15:00:00Z", "2026-11-23T14:00:00Z"
"""Two processes of one container; the node's clock was set back between their starts."""


@pytest.mark.parametrize(
    ("arriving", "stands", "stream", "counts"),
    [
        (report(seq=4), True, True, False),
        (report(seq=5), False, True, False),
        (report(seq=5), True, False, False),
        (report(seq=6), True, True, True),
        (report(seq=6), True, False, True),
        (report(seq=1, incarnation=AFTER), True, True, True),
        (report(seq=1, incarnation=AFTER), False, True, True),
        (report(seq=1, incarnation=AFTER), False, False, True),
        (report(seq=9, incarnation=AFTER), True, False, False),
    ],
)
async def test_seq_orders_one_incarnation_and_the_standing_stream_tells_which_one_lives(
    arriving: RunnerReport, stands: bool, stream: bool, counts: bool
) -> None:
    if arriving.incarnation != AFTER:
        arriving = arriving.model_copy(update={"incarnation": BEFORE})
    known = report(seq=5, incarnation=BEFORE)
    view, urgency = receive(RunnerView(report=known, connected=stands), arriving, NOW, stream=stream)
    assert view.report is (arriving if counts else known)
    if stands and not counts:
        assert urgency is Urgency.NONE


async def test_a_container_that_starts_again_after_its_clock_was_set_back_is_heard(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.say(report(seq=9, incarnation=BEFORE))
    await asyncio.sleep(0.1)
    scene.runner.lines.put_nowait(None)
    await asyncio.sleep(1)
    scene.runner.say(report(seq=1, incarnation=AFTER, state=RunnerState.PENDING))
    await asyncio.sleep(0.1)
    assert scene.view.report == report(seq=1, incarnation=AFTER, state=RunnerState.PENDING)
    assert scene.changes[-1] is Urgency.AT_ONCE


async def test_a_late_line_of_a_stream_that_was_closed_is_not_heard(scene: Scene) -> None:
    scene.store.put(PODS, pod(version=1))
    scene.runner.say(report(seq=1, incarnation=BEFORE))
    await asyncio.sleep(0.1)
    scene.store.put(PODS, pod(version=2, ip=None))
    old, scene.runner.lines = scene.runner.lines, asyncio.Queue()
    scene.store.put(PODS, pod(version=3))
    scene.runner.say(report(seq=1, incarnation=AFTER))
    old.put_nowait(report(seq=7, incarnation=BEFORE).model_dump_json(by_alias=True).encode() + b"\n")
    await asyncio.sleep(0.1)
    assert scene.view.report == report(seq=1, incarnation=AFTER)


def test_a_connection_that_cannot_be_made_and_one_without_a_word_are_told_apart() -> None:
    assert describe(aiohttp.ConnectionTimeoutError("Connection timeout to host")) == "no connection within 2 s"
    assert describe(aiohttp.SocketTimeoutError("Timeout on reading")) == "no word on its report stream for 4.5 s"


async def test_the_address_of_a_pod_is_its_ip_while_the_container_runs() -> None:
    assert address(pod()) == "127.0.0.9"
    assert address(pod(ip=None)) is None
    assert address(None) is None
    failed = pod()
    failed["status"]["phase"] = "Failed"
    assert address(failed) is None


@pytest.mark.parametrize("turns", range(5))
async def test_a_stream_that_ends_as_it_is_hurried_ends(scene: Scene, turns: int) -> None:
    scene.runner.refusals = [RunnerError(0, "refused")] * 1000
    scene.store.put(PODS, pod())
    await asyncio.sleep(60.3)
    (stream,) = (task for task in asyncio.all_tasks() if task.get_name() == "reports of pod pod-0")
    scene.streams.pod_changed("pod-0")
    for _ in range(turns):
        await asyncio.sleep(0)
    stream.cancel()
    await asyncio.wait([stream], timeout=10)
    assert stream.cancelled()
