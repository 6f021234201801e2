"""The runner image's supervisor as the fake kubelet starts it: in a cgroup of its own, with a plan for its faults.

The plan is the engine's (`tests/runner/fake_engine.py`); of it, this reads `{"rank": 1, "deaf": true (nobody listens),
"protocol": 9 (in reports), "unreadable": true (reports), "reject": "LoadModel", "source": "s3://…" (a task of a newer
operator)}`.
"""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from mlx_operator_api.runner import Standing, TaskName, TaskRejected, accepted_in, judge, tasks_accepted
from mlx_operator_api.tasks import RunnerReport
from mlx_runner.download.request import Request
from mlx_runner.supervisor import config, control, machine, main, supervisor
from mlx_runner.supervisor.cgroup import Cgroup
from tests.runner.fake_engine import plan

CGROUP = "TEST_CGROUP"
"""A folder with the files of a cgroup (version 2) that matter; without them there is no limit."""


def line(report: RunnerReport) -> str:
    """What is written to a report stream."""
    today, told = plan(), report.model_dump(mode="json", by_alias=True, exclude_none=True)
    if "protocol" in today:
        told["protocol"] = today["protocol"]
    if today.get("unreadable"):
        told["state"] = "RunnerDreaming"
    return json.dumps(told)


def judged(task: TaskName, epoch: int, standing: Standing) -> TaskRejected | None:
    """The table's word, but for a task that the plan rejects."""
    if plan().get("reject") != task or epoch != standing.epoch:
        return judge(task, epoch, standing)
    return TaskRejected(
        task=task,
        why="a fault of this test",
        state=standing.state,
        task_epoch=epoch,
        epoch=standing.epoch,
        world_size=standing.world_size,
        rank=standing.rank,
        group=standing.group,
        accepted_in=tuple(sorted(accepted_in(task, standing.world_size))),
        tasks_accepted=tuple(sorted(tasks_accepted(standing.state, standing.world_size))),
    )


def request(**given: Any) -> Request:
    """What a download is asked for."""
    return Request(**{**given, **{key: value for key, value in plan().items() if key == "source"}})


def run() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    cgroup = Cgroup(root=Path(os.environ[CGROUP]), membership=Path(os.devnull))
    for module, name, stand_in in (
        (control, "_line", line),
        (machine, "judge", judged),
        (supervisor, "Request", request),
        (supervisor, "Cgroup", lambda: cgroup),
    ):
        assert hasattr(module, name)
        setattr(module, name, stand_in)
    if plan().get("deaf"):
        return asyncio.run(asyncio.sleep(3600, 0))
    return asyncio.run(main.run(config.from_environment()))


if __name__ == "__main__":
    sys.exit(run())
