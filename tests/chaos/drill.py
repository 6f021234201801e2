"""The drill that every fault of the API server must pass."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from mlx_operator.act.kube import KubeError
from mlx_operator_api.conditions import Reason
from tests.apiserver.harness import OperatorProcess, again_in, eventually
from tests.chaos.faults import ApiFault
from tests.chaos.stage import Stage, stage
from tests.cluster.apiserver import ApiServer
from tests.faults import PATIENCE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured."""

    row: ApiFault
    converged: float
    requests: int
    busiest: int
    starts: int

    def __str__(self) -> str:
        """One line for the reader of a test's output."""
        return (
            f"fault {self.row.id}: all Ready {self.converged:.1f} s after its end (bound {self.row.within:g} s), "
            f"{self.requests} requests, at most {self.busiest} in 2 s, operator started {self.starts} times"
        )


async def drill(server: ApiServer, folder: Path, row: ApiFault) -> Outcome:
    """A group serves; the fault begins; the group fails and a second instance is created; the fault ends."""
    namespace = f"fault-{row.id}"
    async with stage(server, namespace, folder, confined=row.at_once) as staged:
        loop = asyncio.get_running_loop()
        if row.early:
            async with row.inject(staged), staged.deployment() as operators:
                await staged.place.create()
                await staged.place.until_ready()
                await _meanwhile(staged, row)
                ended = loop.time()
            return await _after(staged, row, operators, ended)
        async with staged.deployment() as operators:
            await staged.place.create()
            await staged.place.until_ready()
            async with row.inject(staged):
                await _meanwhile(staged, row)
            ended = loop.time()
            return await _after(staged, row, operators, ended)


async def _meanwhile(staged: Stage, row: ApiFault) -> None:
    began = asyncio.get_running_loop().time()
    await row.failure(staged)
    await _create_late(staged)
    # As long as the fault lasts, whatever becomes of it.
    await asyncio.sleep(max(0.0, began + row.seconds - asyncio.get_running_loop().time()))


async def _create_late(staged: Stage) -> bool:
    try:
        await staged.place.create("late", runners=1)
    except KubeError as error:
        if error.transient:  # the API server is away
            return False
        if error.reason != "AlreadyExists":
            raise
    return True


async def _after(staged: Stage, row: ApiFault, operators: list[OperatorProcess], ended: float) -> Outcome:
    place = staged.place
    seconds = row.within * PATIENCE
    await eventually(lambda: _create_late(staged), "the API server takes a second instance")
    tiny = await place.until(again_in(2), "Ready again in epoch 2", seconds=seconds)
    await place.until_ready("late", seconds=seconds)
    converged = asyncio.get_running_loop().time() - ended
    await staged.idle()
    outcome = Outcome(
        row, converged, len(staged.proxy.calls), staged.proxy.busiest(staged.began, 2.0), starts=len(operators)
    )
    assert converged < seconds, outcome
    recorded = [(failure["epoch"], failure["rank"], failure["reason"]) for failure in tiny["status"]["history"]]
    assert recorded == [(1, 1, row.reason)], recorded
    expected = {"tiny-0", "tiny-1", "late-0"}
    assert {pod["metadata"]["name"] for pod in await place.pods()} == expected
    for name in expected:
        twice = {task: count for task, count in staged.accepted(name).items() if count > 1}
        assert not twice, f"{name}: {twice}"
    assert staged.created("pods") == row.pods, "a pod was made twice"
    if row.outlived:
        assert len(operators) == 1, operators[0].lines()[-3000:]
        await _told_once(staged, row)
    staged.check(operators)
    return outcome


async def _told_once(staged: Stage, row: ApiFault) -> None:
    wanted = {Reason.READY: 2}
    if row.reason is Reason.ENGINE_CRASHED:
        wanted[Reason.RUNNER_FAILED] = 1

    async def told() -> bool:
        events = [event for event in await staged.place.events() if event["regarding"]["name"] == "tiny"]
        assert all("series" not in event for event in events), events
        return all([event["reason"] for event in events].count(reason) == times for reason, times in wanted.items())

    await eventually(told, f"each told once in its epoch: {wanted}", 60)
