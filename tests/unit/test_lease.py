"""Leadership: who may lead, when a leader has lost, on a virtual clock against an API server in memory."""

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import LEASES
from mlx_operator.errors import StartError
from mlx_operator.lease import Lease, Timing, first_transitions
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import NOW

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]
TIMING = Timing()


def candidate(kube: FakeKube, identity: str) -> Lease:
    return Lease(kube, "system", "mlx-operator", identity, now=lambda: NOW, timing=TIMING)


def spec(kube: FakeKube) -> dict[str, object]:
    found: dict[str, object] = kube.objects["leases", "system", "mlx-operator"]["spec"]
    return found


def refuse(status: int) -> Callable[[str, str, str], None]:
    def fail(verb: str, plural: str, name: str) -> None:
        raise KubeError(status, "x", "injected")

    return fail


async def test_the_first_candidate_creates_the_lease() -> None:
    kube = FakeKube()
    transitions = await candidate(kube, "a").acquire()
    assert spec(kube)["holderIdentity"] == "a"
    assert spec(kube)["leaseTransitions"] == transitions


async def test_a_new_lease_begins_above_a_deleted_one() -> None:
    kube = FakeKube()
    first = await candidate(kube, "a").acquire()
    kube.objects.clear()
    later = Lease(kube, "system", "mlx-operator", "b", now=lambda: NOW + timedelta(minutes=1), timing=TIMING)
    assert await later.acquire() > first
    assert first_transitions(NOW + timedelta(days=365 * 40)) < 2**31


async def test_a_released_lease_is_taken_at_the_next_try_and_counts_up() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()
    first = candidate(kube, "a")
    before = await first.acquire()
    await first.release()
    began = loop.time()
    assert await candidate(kube, "b").acquire() == before + 1
    assert loop.time() - began < TIMING.retry


async def test_a_silent_leader_is_replaced_after_the_duration_of_our_own_clock() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()
    await candidate(kube, "a").acquire()
    began = loop.time()
    await candidate(kube, "b").acquire()
    assert TIMING.duration < loop.time() - began <= TIMING.duration + 2 * TIMING.retry


async def test_a_restarted_container_need_not_wait_for_its_own_predecessor() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()

    def process(pod: str, identity: str) -> Lease:
        return Lease(kube, "system", "mlx-operator", identity, now=lambda: NOW, timing=TIMING, pod=pod)

    before = await process("operator-1", "operator-1_aaaa").acquire()
    began = loop.time()
    assert await process("operator-1", "operator-1_bbbb").acquire() == before + 1
    assert loop.time() == began
    await process("operator", "operator_cccc").acquire()
    assert loop.time() - began > TIMING.duration


async def test_a_leader_that_renews_is_not_replaced() -> None:
    kube = FakeKube()
    first = candidate(kube, "a")
    await first.acquire()
    lost: list[str] = []
    holding = asyncio.create_task(first.hold(lost.append))
    second = candidate(kube, "b")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(second.acquire(), 120)
    assert second.readable
    assert lost == []
    holding.cancel()


async def test_a_leader_is_lost_at_the_deadline_although_a_request_hangs() -> None:
    class Hanging(FakeKube):
        async def replace(self, *_: object, **__: object) -> dict[str, object]:
            await asyncio.sleep(3600)
            raise AssertionError("unreachable")

    kube, loop, lost = Hanging(), asyncio.get_running_loop(), asyncio.Event()
    lease = candidate(kube, "a")
    await lease.acquire()
    began = loop.time()
    holding = asyncio.create_task(lease.hold(lambda why: lost.set()))
    await lost.wait()
    assert loop.time() - began == pytest.approx(TIMING.renew_deadline)
    holding.cancel()


async def test_a_leader_whose_renewals_fail_is_lost_before_another_may_lead() -> None:
    kube, loop, lost = FakeKube(), asyncio.get_running_loop(), asyncio.Event()
    lease = candidate(kube, "a")
    await lease.acquire()
    holding = asyncio.create_task(lease.hold(lambda why: lost.set()))
    await asyncio.sleep(2.5 * TIMING.retry)
    renewed = spec(kube)["renewTime"]
    began = loop.time()
    kube.before = refuse(0)
    await lost.wait()
    assert loop.time() - began < TIMING.duration
    assert renewed
    holding.cancel()


async def test_a_short_outage_costs_no_leadership() -> None:
    kube = FakeKube()
    lost: list[str] = []
    lease = candidate(kube, "a")
    await lease.acquire()
    holding = asyncio.create_task(lease.hold(lost.append))
    for _ in range(10):
        kube.before = refuse(503)
        await asyncio.sleep(TIMING.retry * 2)
        kube.before = lambda verb, plural, name: None
        await asyncio.sleep(TIMING.retry * 2)
    assert lost == []
    holding.cancel()


async def test_a_leader_that_was_replaced_is_lost_at_its_next_renewal() -> None:
    kube, lost = FakeKube(), asyncio.Event()
    lease = candidate(kube, "a")
    await lease.acquire()
    known = kube.objects["leases", "system", "mlx-operator"]
    kube.put(LEASES, {**known, "spec": {**known["spec"], "holderIdentity": "b"}})
    holding = asyncio.create_task(lease.hold(lambda why: lost.set()))
    await asyncio.wait_for(lost.wait(), TIMING.retry + 0.1)
    await holding


async def test_our_own_write_whose_answer_was_lost_is_no_loss() -> None:
    kube, losing = FakeKube(), [True]
    lost: list[str] = []
    lease = candidate(kube, "a")
    await lease.acquire()

    def lose(verb: str, plural: str, name: str) -> None:
        if verb == "update" and losing:
            losing.clear()
            raise KubeError(0, "TimeoutError", "no answer")

    kube.after = lose
    holding = asyncio.create_task(lease.hold(lost.append))
    await asyncio.sleep(60)
    assert lost == []
    holding.cancel()


async def test_missing_permissions_end_the_start_with_a_sentence() -> None:
    kube = FakeKube()
    kube.before = refuse(403)
    with pytest.raises(StartError, match="Lease system/mlx-operator"):
        await candidate(kube, "a").acquire()


async def test_of_two_candidates_at_once_one_leads() -> None:
    kube = FakeKube()
    tasks = [asyncio.create_task(candidate(kube, name).acquire()) for name in ("a", "b")]
    done, pending = await asyncio.wait(tasks, timeout=TIMING.duration / 2)
    assert (len(done), len(pending)) == (1, 1)
    pending.pop().cancel()
