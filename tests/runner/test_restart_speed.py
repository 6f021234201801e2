"""What a restart costs: with a spare engine standing by, connect, load and warm-up only."""

import asyncio
import os
import signal
import time
from pathlib import Path

from mlx_operator_api.runner import RunnerState
from mlx_runner.supervisor.watch import read_process

from .faulting import ENVIRONMENT, ask, gone, met
from .supervisors import Group, group

S = RunnerState
QUIET_SECONDS = 5.0


async def restart(instance: Group, epoch: int) -> float:
    """Seconds from the kill of an engine to the first token of a new request in the next epoch."""
    engines = [pid for pod in instance.pods for pid in pod.engines()]
    began = time.monotonic()
    os.kill(instance.pods[1].engines()[0], signal.SIGKILL)
    await asyncio.gather(*(pod.state(S.FAILED, epoch) for pod in instance.pods))
    await instance.ready(epoch + 1)
    assert await ask(instance, 1)
    took = time.monotonic() - began
    await gone(engines)
    return took


async def spares(instance: Group) -> list[int]:
    """A spare beside each engine, with its imports done: it sleeps."""

    def done(pid: int) -> bool:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "mlx-spare" and "libmlx" in maps(pid)

    await met(lambda: all(len(pod.spares()) == 1 and done(pod.spares()[0]) for pod in instance.pods), "a spare each")
    found = [pod.spares()[0] for pod in instance.pods]
    await met(lambda: all(f"engine started pid={pid} " in log(instance) for pid in found), "their imports are done")
    return found


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def memory(pid: int, kind: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) // 1024


def log(instance: Group) -> str:
    return "".join(pod.log for pod in instance.pods)


async def test_the_next_epoch_takes_the_spares_which_cost_no_cpu_until_then(tmp_path: Path, models: Path) -> None:
    async with group(tmp_path, 2, engine=None, models=models, **ENVIRONMENT) as instance:
        await instance.ready()
        assert await ask(instance)
        waiting = await spares(instance)
        await met(lambda: all((p := read_process(pid)) and p.state == "S" for pid in waiting), "the spares sleep")
        before = [read_process(pid) for pid in waiting]
        await asyncio.sleep(QUIET_SECONDS)
        for pid, then in zip(waiting, before, strict=True):
            now = read_process(pid)
            assert now is not None and then is not None
            assert now.cpu - then.cpu < 0.02 * QUIET_SECONDS, "a spare must sleep"
        resident, share = (memory(waiting[0], kind) for kind in ("Rss", "Pss"))
        print(f"a spare: {resident} MiB resident, {share} MiB its proportional share")
        quick = await restart(instance, 1)
        assert sorted(pid for pod in instance.pods for pid in pod.engines()) == sorted(waiting)
        slow = await without_spares(instance)
        print(f"kill to first token: {quick:.2f} s with spares, {slow:.2f} s without")
        assert quick < 20.0, "it is about a second on an idle machine"


async def without_spares(instance: Group) -> float:
    killed = await spares(instance)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    await met(lambda: all(f"signal 9 (SIGKILL) pid={pid}\n" in log(instance) for pid in killed), "their ends are seen")
    return await restart(instance, 2)
