"""The kubelet with its runners in this process, which here places every pod and tells what runners were told."""

import asyncio
import json
from typing import Any

from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport
from tests.apiserver.kubelet import Container
from tests.scale.kubelet import InstantKubelet, InstantSupervisor


class TellingKubelet(InstantKubelet):
    """Places every pod, whatever it asks of its node."""

    def places(self, pod: dict[str, Any]) -> bool:
        return True

    async def _probe_changes(self, container: Container, supervisor: InstantSupervisor) -> None:
        """Its engines have no ring port that would be seen to listen: Tensor needs the word of one."""
        loop = asyncio.get_running_loop()

        def reported(report: RunnerReport) -> None:
            if report.state is RunnerState.CONNECTING and not report.ring_listening:
                loop.call_soon(lambda: supervisor.machine.note(ring_listening=True))

        supervisor.machine.subscribe(reported)
        await super()._probe_changes(container, supervisor)

    def told(self, uid: str) -> dict[str, Any] | None:
        """What the runner in a pod was created with, as JSON; None: it has none."""
        supervisor = self.supervisors.get(uid)
        if supervisor is None or supervisor.runner is None:
            return None
        found: dict[str, Any] = json.loads(supervisor.runner.facts.model_dump_json(by_alias=True, exclude_none=True))
        return found
