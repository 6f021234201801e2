"""The kubelet with its runners in this process, which here places every pod and tells what runners were told."""

import json
from typing import Any

from tests.scale.kubelet import InstantKubelet


class TellingKubelet(InstantKubelet):
    """Places every pod, whatever it asks of its node."""

    def places(self, pod: dict[str, Any]) -> bool:
        return True

    def told(self, uid: str) -> dict[str, Any] | None:
        """What the runner in a pod was created with, as JSON; None: it has none."""
        supervisor = self.supervisors.get(uid)
        if supervisor is None or supervisor.runner is None:
            return None
        found: dict[str, Any] = json.loads(supervisor.runner.facts.model_dump_json(by_alias=True, exclude_none=True))
        return found
