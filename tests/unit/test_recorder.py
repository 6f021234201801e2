"""The event recorder: sortable names, folded repeats, nothing counted twice, nothing that hurts a reconcile."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.recorder import MAX_NOTE_BYTES, Recorder, cut, event
from mlx_operator.act.resources import EVENTS, Resource
from mlx_operator.decide.actions import Notice, Step
from mlx_operator.errors import REFUSAL_SECONDS
from mlx_operator.metrics import Metrics
from mlx_operator_api.conditions import Reason
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import NOW, UID, instance

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]
FAILED = Notice(
    type="Warning",
    reason=Reason.RUNNER_FAILED,
    note="rank 1/2 pod tiny-1 on node n2: engine killed by SIGKILL",
    epoch=3,
    action="RestartGroup",
    step=Step.FAILED,
    related=("tiny-1", "pod-1"),
    rank=1,
)


def test_a_name_sorts_by_epoch_and_step_of_the_lifecycle() -> None:
    name = event(instance(), FAILED, NOW, "operator-1")["metadata"]["name"]
    assert name == f"tiny.11111111.e0003.09.{Reason.RUNNER_FAILED.ordinal:03d}.runnerfailed.r1"


def test_an_event_says_what_describe_needs() -> None:
    made = event(instance(), FAILED, NOW, "operator-1")
    assert made["regarding"]["uid"] == instance()["metadata"]["uid"]
    assert made["related"]["kind"] == "Pod"
    assert made["eventTime"] == "2026-11-23T15:00:00.250000Z"
    assert made["action"] == "RestartGroup"
    assert made["type"] == "Warning"


@pytest.mark.parametrize("text", ["short", "x" * 5000, "é" * 1024, "🙂" * 600, "x" + "é" * 1024])
def test_a_note_is_cut_at_1024_bytes_on_a_whole_character(text: str) -> None:
    note = cut(text)
    assert len(note.encode()) <= MAX_NOTE_BYTES
    assert text.startswith(note.removesuffix("…"))
    assert note == text or len(note.encode()) > MAX_NOTE_BYTES - 8


async def _posted(kube: FakeKube, *offsets: float) -> None:
    recorder = Recorder(kube, reporter="operator-1", metrics=Metrics())
    task = asyncio.create_task(recorder.run())
    for offset in offsets:
        recorder.emit(instance(), FAILED, NOW + timedelta(seconds=offset))
        await recorder.posted()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _only(kube: FakeKube) -> dict[str, object]:
    (found,) = (item for place, item in kube.objects.items() if place[0] == EVENTS.plural)
    return found


async def test_a_repeat_is_counted_in_the_series() -> None:
    kube = FakeKube()
    await _posted(kube, 0, 5, 9)
    assert _only(kube)["series"] == {"count": 3, "lastObservedTime": "2026-11-23T15:00:09.250000Z"}


async def test_an_attempt_whose_answer_was_lost_is_not_counted_as_a_repeat() -> None:
    kube, lost = FakeKube(), iter([KubeError(0, "TimeoutError", "no answer")])

    def lose(verb: str, plural: str, name: str) -> None:
        if (error := next(lost, None)) is not None:
            raise error

    kube.after = lose
    await _posted(kube, 0)
    assert "series" not in _only(kube)
    assert kube.count("create", "events") == 2


async def test_transient_errors_are_repeated() -> None:
    kube, errors = FakeKube(), iter([KubeError(503, "x", "later"), KubeError(429, "x", "later")])

    def fail(verb: str, plural: str, name: str) -> None:
        if (error := next(errors, None)) is not None:
            raise error

    kube.before = fail
    await _posted(kube, 0)
    assert _only(kube)["note"] == FAILED.note


async def test_an_api_server_that_is_away_for_half_a_minute_costs_no_event() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()
    began = loop.time()

    def fail(verb: str, plural: str, name: str) -> None:
        if loop.time() - began < 30:
            raise KubeError(0, "ClientConnectorError", "refused")

    kube.before = fail
    await _posted(kube, 0)
    assert _only(kube)["note"] == FAILED.note


async def test_an_api_server_that_has_just_started_and_has_not_read_its_roles_costs_no_event() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()
    began = loop.time()

    def fail(verb: str, plural: str, name: str) -> None:
        if loop.time() - began < REFUSAL_SECONDS / 2:
            raise KubeError(403, "Forbidden", 'cannot create resource "events"')

    kube.before = fail
    await _posted(kube, 0)
    assert _only(kube)["note"] == FAILED.note


async def test_a_permission_that_is_missing_for_good_is_doubted_once() -> None:
    kube = FakeKube()

    def fail(verb: str, plural: str, name: str) -> None:
        raise KubeError(403, "Forbidden", 'cannot create resource "events"')

    kube.before = fail
    await _posted(kube, 0)
    doubted = kube.count("create", "events")
    assert doubted > 1
    await _posted(kube, 0, 5, 9)
    assert kube.count("create", "events") == 2 * doubted + 2


async def test_a_namespace_that_is_being_terminated_is_not_asked_again() -> None:
    kube = FakeKube()
    words = 'events "x" is forbidden: unable to create new content in namespace team because it is being terminated'

    def fail(verb: str, plural: str, name: str) -> None:
        raise KubeError(403, "Forbidden", words)

    kube.before = fail
    await _posted(kube, 0)
    assert kube.count("create", "events") == 1


async def test_an_event_whose_former_one_goes_while_it_is_counted_is_recorded_anew() -> None:
    kube = FakeKube()
    await _posted(kube, 0)

    def go(verb: str, plural: str, name: str) -> None:
        if verb == "get":
            kube.objects.clear()

    kube.before = go
    await _posted(kube, 5)
    assert _only(kube)["eventTime"] == "2026-11-23T15:00:05.250000Z"


async def test_a_refused_event_is_dropped_and_the_next_one_is_recorded() -> None:
    kube, errors = FakeKube(), iter([KubeError(422, "Invalid", "action: Required value")])

    def fail(verb: str, plural: str, name: str) -> None:
        if (error := next(errors, None)) is not None:
            raise error

    kube.before = fail
    await _posted(kube, 0, 5)
    assert _only(kube)["eventTime"] == "2026-11-23T15:00:05.250000Z"


async def test_the_queue_is_bounded_and_drops_the_oldest() -> None:
    metrics = Metrics()
    recorder = Recorder(FakeKube(), reporter="operator-1", metrics=metrics)
    for second in range(1005):
        recorder.emit(instance(), FAILED, NOW + timedelta(seconds=second))
    assert metrics.registry.get_sample_value("mlx_operator_events_dropped_total") == 5


async def test_an_event_that_hangs_keeps_those_of_most_other_instances_from_nothing() -> None:
    kube, gate = FakeKube(), asyncio.Event()
    create = kube.create

    async def slow(resource: Resource, namespace: str | None, body: Mapping[str, Any], **more: Any) -> Any:
        if body["regarding"]["uid"] == UID:
            await gate.wait()
        return await create(resource, namespace, body, **more)

    kube.create = slow  # type: ignore[method-assign]
    recorder = Recorder(kube, reporter="operator-1", metrics=Metrics())
    task = asyncio.create_task(recorder.run())
    recorder.emit(instance(), FAILED, NOW)
    for number in range(8):  # somewhere else than the first, most of them
        recorder.emit(instance(f"other-{number}", uid=f"{number}{UID}"), FAILED, NOW)
    for _ in range(100):
        await asyncio.sleep(0)
    assert 1 < len(kube.objects) < 9
    gate.set()
    await recorder.posted()
    assert len(kube.objects) == 9
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_flush_has_an_end_while_the_api_server_is_away() -> None:
    kube = FakeKube()

    def fail(verb: str, plural: str, name: str) -> None:
        raise KubeError(0, "ClientConnectorError", "refused")

    kube.before = fail
    recorder = Recorder(kube, reporter="operator-1", metrics=Metrics())
    task = asyncio.create_task(recorder.run())
    recorder.emit(instance(), FAILED, NOW)
    await asyncio.wait_for(recorder.flush(), 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
