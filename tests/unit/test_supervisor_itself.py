"""What the supervisor decides without any engine: whom it answers, and that its watch goes on."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import LoadModel, TaskRequest
from mlx_runner.progress import Phase, Snapshot
from mlx_runner.supervisor import supervisor as module
from mlx_runner.supervisor import watch
from mlx_runner.supervisor.config import Config
from mlx_runner.supervisor.runner import Runner
from mlx_runner.supervisor.supervisor import BadTaskError, Supervisor
from mlx_runner.supervisor.watch import Process


@pytest.fixture
async def supervisor(tmp_path: Path) -> Supervisor:
    return Supervisor(Config(uid="mine", rank=0, token="t", state_dir=tmp_path))


def watches() -> list["asyncio.Task[None]"]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "watch"]


async def test_a_bug_in_the_watch_is_logged_and_the_next_stall_is_still_seen(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = 0

    def read(pid: int, *, threads: bool) -> Process:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ValueError("what nobody thought of")
        return Process("T", 0.0)

    monkeypatch.setattr(module, "read_process", read)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(watch, "STOPPED_SECONDS", 0.0)
    monkeypatch.setattr(supervisor.engines, "prepare", lambda: None)
    failed: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()

    def fail(reason: Reason, *_: Any, **__: Any) -> None:
        if not failed.done():
            failed.set_result(reason)

    async def clean_up() -> None:
        pass

    stopped = SimpleNamespace(pid=1, alive=True, progress=Snapshot(0, 0, Phase.IDLE, -1, 0.0))
    facts = SimpleNamespace(deadlines=SimpleNamespace(progress=60.0))
    supervisor.runner = cast(
        Runner,
        SimpleNamespace(
            engine=stopped, facts=facts, fail=fail, clean_up=clean_up, true_state=lambda: RunnerState.READY
        ),
    )
    supervisor.start()
    assert await asyncio.wait_for(failed, 30) is Reason.RUNNER_STALLED
    assert "a bug in the watch of the engine" in caplog.text
    assert "what nobody thought of" in caplog.text
    await supervisor.close()
    await asyncio.wait(watches(), timeout=30)
    await asyncio.sleep(0)
    assert not watches(), "one that was ended on purpose stays away"


@pytest.mark.parametrize(
    ("own", "asked", "words"),
    [
        (1, 0, "protocol 0 is not spoken here: this runner speaks 1"),
        (1, 1, None),
        (1, 2, "protocol 2 is not spoken here: this runner speaks 1"),
        (3, 1, "protocol 1 is not spoken here: this runner speaks 2 and 3"),
        (3, 2, None),
        (3, 3, None),
        (3, 4, "protocol 4 is not spoken here: this runner speaks 2 and 3"),
    ],
)
async def test_tasks_of_its_own_protocol_and_the_one_before_are_understood(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, own: int, asked: int, words: str | None
) -> None:
    monkeypatch.setattr(module, "PROTOCOL", own)
    strange = TaskRequest(protocol=asked, instance_uid="other", epoch=1, rank=0, task=LoadModel())
    with pytest.raises(BadTaskError) as caught:
        supervisor.handle(strange)
    assert str(caught.value) == (words or "instanceUid 'other' is not this runner's: it is of 'mine'")


class WaitedFor:
    """An engine that was last heard of long ago."""

    def __init__(self, phase: Phase) -> None:
        self.ended = asyncio.Event()
        self.looks = 0
        self._last = Snapshot(5, 9, phase, 0, time.monotonic() - 60.0, rows=1)

    async def wait(self) -> None:
        await self.ended.wait()

    @property
    def progress(self) -> Snapshot:
        self.looks += 1
        return self._last


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.name)
async def test_only_a_worker_whose_engine_is_idle_for_long_serves_nobody(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, phase: Phase
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    supervisor.machine._report = supervisor.machine.report.model_copy(update={"state": RunnerState.READY, "epoch": 1})
    engine = WaitedFor(phase)
    async with asyncio.timeout(30):
        done = asyncio.create_task(supervisor._worker_done(cast(Runner, SimpleNamespace(engine=engine))))
        while not done.done() and engine.looks < 10:  # noqa: ASYNC110 (a look has no event)
            await asyncio.sleep(0.001)
        assert done.done() is (phase is Phase.IDLE)
        engine.ended.set()
        await done
