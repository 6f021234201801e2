"""Leadership: who may lead, when a leader has lost, on a virtual clock against an API server in memory."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import LEASES
from mlx_operator.errors import REFUSAL_SECONDS, StartError
from mlx_operator.lease import Lease, Timing, first_transitions, lead
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


async def test_a_lease_is_released_also_after_a_renewal_that_was_cut_short() -> None:
    kube = FakeKube()
    lease = candidate(kube, "a")
    await lease.acquire()
    known = kube.objects["leases", "system", "mlx-operator"]
    kube.put(LEASES, {**known, "spec": {**known["spec"], "renewTime": "later"}})
    await lease.release()
    assert spec(kube)["holderIdentity"] == ""


async def test_the_lease_of_a_successor_is_not_released() -> None:
    kube = FakeKube()
    lease = candidate(kube, "a")
    await lease.acquire()
    known = kube.objects["leases", "system", "mlx-operator"]
    kube.put(LEASES, {**known, "spec": {**known["spec"], "holderIdentity": "b"}})
    await lease.release()
    assert spec(kube)["holderIdentity"] == "b"


async def test_a_silent_leader_is_replaced_after_the_duration_of_our_own_clock() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()
    await candidate(kube, "a").acquire()
    began = loop.time()
    await candidate(kube, "b").acquire()
    assert TIMING.duration < loop.time() - began <= TIMING.duration + TIMING.retry


async def test_a_standby_tries_at_the_instant_at_which_the_lease_runs_out() -> None:
    kube, loop = FakeKube(), asyncio.get_running_loop()
    await candidate(kube, "a").acquire()
    standby = asyncio.create_task(candidate(kube, "b").acquire())
    await asyncio.sleep(TIMING.retry * 1.5)
    known = kube.objects["leases", "system", "mlx-operator"]
    kube.put(LEASES, {**known, "spec": {**known["spec"], "renewTime": "later"}})
    began = loop.time()
    await standby
    # Half a retry until it saw the renewal, then the duration: no further rounding up to the next look.
    assert loop.time() - began == pytest.approx(TIMING.retry / 2 + TIMING.duration, abs=0.2)


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


class Late(FakeKube):
    """Answers every request that creates or replaces after 2 s: it was carried out at once."""

    async def create(self, *args: Any, **more: Any) -> dict[str, Any]:
        made = await super().create(*args, **more)
        await asyncio.sleep(2)
        return made

    async def replace(self, *args: Any, **more: Any) -> dict[str, Any]:
        made = await super().replace(*args, **more)
        await asyncio.sleep(2)
        return made


@pytest.mark.parametrize("there", [False, True])
async def test_the_first_deadline_runs_from_before_the_request_that_took_the_lease(there: bool) -> None:
    kube, loop, lost = Late(), asyncio.get_running_loop(), asyncio.Event()
    if there:
        kube.put(LEASES, {"metadata": {"namespace": "system", "name": "mlx-operator"}})
    lease = candidate(kube, "a")
    began = loop.time()
    await lease.acquire()
    kube.before = refuse(0)
    holding = asyncio.create_task(lease.hold(lambda why: lost.set()))
    await lost.wait()
    assert loop.time() - began == pytest.approx(TIMING.renew_deadline)
    holding.cancel()


async def test_the_deadline_of_a_lease_whose_taking_was_not_answered_runs_from_that_request() -> None:
    kube, loop, lost = FakeKube(), asyncio.get_running_loop(), asyncio.Event()
    losing = [KubeError(0, "TimeoutError", "no answer")]

    def lose(verb: str, plural: str, name: str) -> None:
        if losing:
            raise losing.pop()

    kube.after = lose
    lease = candidate(kube, "a")
    began = loop.time()
    await lease.acquire()
    assert loop.time() - began == pytest.approx(TIMING.retry)
    kube.before = refuse(0)
    holding = asyncio.create_task(lease.hold(lambda why: lost.set()))
    await lost.wait()
    assert loop.time() - began == pytest.approx(TIMING.renew_deadline)
    holding.cancel()


@pytest.mark.parametrize("empty", [{}, {"spec": None}, {"spec": {}}])
async def test_a_lease_that_somebody_made_empty_is_taken(empty: dict[str, Any]) -> None:
    kube = FakeKube()
    kube.put(LEASES, {"metadata": {"namespace": "system", "name": "mlx-operator"}, **empty})
    lease = candidate(kube, "a")
    assert await lease.acquire() == first_transitions(NOW)
    assert spec(kube)["holderIdentity"] == "a"
    await lease.release()
    assert spec(kube)["holderIdentity"] == ""


async def test_a_lease_that_somebody_emptied_meanwhile_is_lost() -> None:
    kube, lost = FakeKube(), asyncio.Event()
    lease = candidate(kube, "a")
    await lease.acquire()
    kube.put(LEASES, {"metadata": {"namespace": "system", "name": "mlx-operator"}})
    holding = asyncio.create_task(lease.hold(lambda why: lost.set()))
    await asyncio.wait_for(lost.wait(), TIMING.retry + 0.1)
    await holding


async def test_an_old_lease_counts_on_from_above_what_an_operator_without_one_used() -> None:
    kube = FakeKube()
    old = {"holderIdentity": "", "leaseTransitions": 3}
    kube.put(LEASES, {"metadata": {"namespace": "system", "name": "mlx-operator"}, "spec": old})
    without = first_transitions(NOW - timedelta(hours=1))
    assert await candidate(kube, "a").acquire() > without


@pytest.mark.parametrize("end", ["error", "return", "cancel"])
async def test_leadership_is_lost_when_the_renewing_ends_in_whatever_way(end: str) -> None:
    class Ending(Lease):
        async def hold(self, lost: Callable[[str], None]) -> None:
            await asyncio.sleep(1)
            if end == "error":
                raise ZeroDivisionError("a bug")
            if end == "cancel":
                raise asyncio.CancelledError

    kube, lost = FakeKube(), asyncio.Queue[str]()
    lease = Ending(kube, "system", "mlx-operator", "a", now=lambda: NOW, timing=TIMING)
    leading = asyncio.create_task(lead(lease, lambda transitions: asyncio.sleep(3600), lost.put_nowait))
    assert await asyncio.wait_for(lost.get(), 2) == "the Lease is no longer renewed"
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    assert lost.empty()


async def test_a_loss_is_told_once_and_an_end_of_the_work_is_none() -> None:
    kube, lost = FakeKube(), asyncio.Queue[str]()
    await lead(candidate(kube, "a"), lambda transitions: asyncio.sleep(30), lost.put_nowait)
    assert spec(kube)["holderIdentity"] == ""
    leading = asyncio.create_task(lead(candidate(kube, "b"), lambda transitions: asyncio.sleep(3600), lost.put_nowait))
    await asyncio.sleep(1)
    known = kube.objects["leases", "system", "mlx-operator"]
    kube.put(LEASES, {**known, "spec": {**known["spec"], "holderIdentity": "c"}})
    await asyncio.sleep(30)
    assert lost.get_nowait() == "c holds the Lease"
    assert lost.empty()
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)


async def test_missing_permissions_end_the_start_with_a_sentence() -> None:
    kube = FakeKube()
    kube.before = refuse(403)
    with pytest.raises(StartError, match="Lease system/mlx-operator"):
        await candidate(kube, "a").acquire()


async def test_an_api_server_that_has_not_read_its_roles_yet_is_waited_for() -> None:
    kube = FakeKube()
    kube.before = refuse(403)
    acquiring = asyncio.create_task(candidate(kube, "a").acquire())
    await asyncio.sleep(REFUSAL_SECONDS / 2)
    assert not acquiring.done()
    kube.before = lambda verb, plural, name: None
    assert await asyncio.wait_for(acquiring, 10)


async def test_of_two_candidates_at_once_one_leads() -> None:
    kube = FakeKube()
    tasks = [asyncio.create_task(candidate(kube, name).acquire()) for name in ("a", "b")]
    done, pending = await asyncio.wait(tasks, timeout=TIMING.duration / 2)
    assert (len(done), len(pending)) == (1, 1)
    pending.pop().cancel()
