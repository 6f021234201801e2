"""What an operator's memory is made of: its parts, one after the other, in a process of their own.

python -m tests.scale.memory KUBECONFIG NAMESPACE: the imports, the store with all objects, the streams to all runners;
prints the resident MiB after each as JSON. What the real process has beyond that is kopf's, and what lists left behind.
"""

import asyncio
import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_operator.act.kube import Kube, configuration
from mlx_operator.act.resources import INSTANCES, PODS, SERVICES
from mlx_operator.act.runner import RunnerPort
from mlx_operator.act.tokens import operator_key
from mlx_operator.controller import wall_clock
from mlx_operator.decide.observed import Settings
from mlx_operator.main import Process
from mlx_operator.metrics import Metrics
from mlx_operator.observe.reports import ReportStreams
from mlx_operator.observe.store import Store
from mlx_operator.observe.sweep import Lister, Scope

_SECONDS = 120.0


@dataclass(frozen=True)
class Parts:
    """Resident MiB after each step, and how many of what it holds."""

    imports: float
    stored: float
    objects: int
    streaming: float
    streams: int


async def parts(kubeconfig: str, namespace: str) -> Parts:
    """Take the steps."""
    assert Process.__module__ in sys.modules  # everything that the operator imports
    imports, metrics = _resident(), Metrics()
    kube = Kube(await configuration(kubeconfig))
    port = RunnerPort()
    try:
        key = await operator_key(kube, namespace)
        store = Store(Settings(runner_image="", key_id=key.key_id))
        await Lister(kube, store, Scope(), metrics).seed()
        objects, stored = sum(store.count(kind) for kind in (INSTANCES, PODS, SERVICES)), _resident()
        streams = ReportStreams(
            store, port, token_of=key.token, changed=lambda *_: None, now=wall_clock, metrics=metrics
        )
        uids = [pod["metadata"]["uid"] for pod in store.pods()]
        for uid in uids:
            streams.pod_changed(uid)
        async with asyncio.timeout(_SECONDS):
            while not all(store.view(uid).connected for uid in uids):  # noqa: ASYNC110 (each has its own event)
                await asyncio.sleep(0.5)
        streaming = _resident()
        await streams.close()
    finally:
        await port.close()
        await kube.close()
    return Parts(imports, stored, objects, streaming, len(uids))


def _resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(asyncio.run(parts(*sys.argv[1:])))))
