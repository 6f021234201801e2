"""The work queue: client-go's semantics, on a virtual clock."""

import asyncio

import pytest

from mlx_operator.workqueue import WorkQueue

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


@pytest.fixture
def queue() -> WorkQueue[str]:
    return WorkQueue(base=0.05, cap=5.0, spread=lambda: 1.0)


async def test_a_key_is_queued_once_however_often_it_is_added(queue: WorkQueue[str]) -> None:
    for _ in range(3):
        queue.add("a")
    assert len(queue) == 1
    assert await queue.get() == "a"
    queue.done("a", ok=True)
    assert queue.idle


async def test_the_age_is_that_of_the_key_that_waits_longest(
    queue: WorkQueue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("mlx_operator.workqueue.time.monotonic", lambda: now)
    assert queue.age == 0
    queue.add("a")
    now = 103.0
    queue.add("b")
    queue.add("a")
    assert queue.age == 3
    await queue.get()
    assert queue.age == 0
    now = 104.0
    assert queue.age == 1


async def test_a_key_is_never_with_two_workers(queue: WorkQueue[str]) -> None:
    queue.add("a")
    await queue.get()
    queue.add("a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 100)


async def test_a_key_added_while_it_is_worked_on_runs_again(queue: WorkQueue[str]) -> None:
    queue.add("a")
    await queue.get()
    queue.add("a")
    queue.done("a", ok=True)
    assert await asyncio.wait_for(queue.get(), 1) == "a"


async def test_other_keys_go_on_while_one_is_worked_on(queue: WorkQueue[str]) -> None:
    queue.add("a")
    await queue.get()
    queue.add("b")
    assert await asyncio.wait_for(queue.get(), 1) == "b"


async def test_failures_back_off_exponentially_up_to_the_cap(queue: WorkQueue[str]) -> None:
    loop, delays = asyncio.get_running_loop(), []
    queue.add("a")
    await queue.get()
    for _ in range(10):
        failed_at = loop.time()
        queue.done("a", ok=False)
        await queue.get()
        delays.append(round(loop.time() - failed_at, 3))
    assert delays[:4] == [0.05, 0.1, 0.2, 0.4]
    assert delays[-1] == 5.0


async def test_any_add_comes_before_the_back_off(queue: WorkQueue[str]) -> None:
    loop = asyncio.get_running_loop()
    queue.add("a")
    for _ in range(8):
        await queue.get()
        queue.done("a", ok=False)
        queue.add("a")
    before = loop.time()
    assert await queue.get() == "a"
    assert loop.time() == before


async def test_success_forgets_the_failures(queue: WorkQueue[str]) -> None:
    loop = asyncio.get_running_loop()
    for ok in (False, False, False, True, False):
        queue.add("a")
        await queue.get()
        queue.done("a", ok=ok)
    failed_at = loop.time()
    await queue.get()
    assert loop.time() - failed_at == pytest.approx(0.05)


async def test_of_several_times_the_earliest_counts(queue: WorkQueue[str]) -> None:
    loop = asyncio.get_running_loop()
    queue.add_after("a", 60)
    queue.add_after("a", 2)
    queue.add_after("a", 30)
    began = loop.time()
    await queue.get()
    assert loop.time() - began == pytest.approx(2)
    queue.done("a", ok=True)
    assert queue.idle


async def test_close_cancels_the_timers(queue: WorkQueue[str]) -> None:
    queue.add_after("a", 1)
    queue.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 10)
