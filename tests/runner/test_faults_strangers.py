"""Connections of strangers to the ports between the ranks."""

import asyncio
import time
from pathlib import Path

from mlx_operator_api.conditions import Reason
from mlx_operator_api.names import FRAME_PORT, ring_port
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import (
    DeadlineSeconds,
    LoadModel,
    Sharding,
    StartWarmup,
)
from mlx_runner import sockets
from tests.faults import Fault, Layer, fault

from .faulting import ask, confirm, engines_of, heals, instance_of, met

S = RunnerState


@fault(
    Fault(
        id="stranger-ring",
        what="a stranger on the ring port",
        injected="a TCP connection that a probe or a port scan makes before the left neighbour does",
        layer=Layer.GROUP,
        sharding=Sharding.TENSOR,
        rank=None,
        state=S.CONNECTING,
        reason=Reason.CONNECT_TIMEOUT,
        says="not connected within … s: still waiting for rank …; ring port 8101 was … listening",
        within=40.0,
    )
)
async def test_a_stranger_that_takes_a_neighbours_place_costs_one_epoch_and_no_more(
    tmp_path: Path, models: Path, row: Fault
) -> None:
    async with instance_of(row, tmp_path, models) as instance:
        first, last = instance.pods
        instance.deadlines = DeadlineSeconds(connect=5.0)
        await instance.create()
        await instance.download()
        await met(lambda: all("engine started" in pod.log for pod in instance.pods), "the imports are done")
        engines, began = engines_of(instance), time.monotonic()
        await first.send(instance.peers())
        await first.until(lambda r: r.ring_listening, "a listening ring port")
        _, stranger = await asyncio.open_connection(first.host, ring_port(1))
        await met(lambda: not sockets.listens(ring_port(1), first.host), "the ring took the stranger")
        await last.send(instance.peers())
        await confirm(row, instance, began)
        stranger.close()
        instance.deadlines = DeadlineSeconds()
        await heals(instance, 2, engines)


@fault(
    Fault(
        id="stranger-frames",
        what="strangers on the frame port",
        injected="connections that are silent, speak HTTP, or know no token, before the peers come",
        layer=Layer.GROUP,
        state=None,
        reason=None,
        then="nothing fails: who does not know the token is closed and named in the log",
    )
)
async def test_strangers_on_the_frame_port_are_turned_away(tmp_path: Path, models: Path, row: Fault) -> None:
    async with instance_of(row, tmp_path, models) as instance:
        first, last = instance.pods
        await instance.create()
        await instance.download()
        await first.send(instance.peers())
        await first.until(lambda r: r.waiting_for == (1,), "it listens")
        writers = []
        for words in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(200), b"\x00" * 4096):
            _, writer = await asyncio.open_connection(first.host, FRAME_PORT)
            writer.write(words)
            writers.append(writer)
        await last.send(instance.peers())
        for pod in instance.pods:
            await pod.state(S.CONNECTED, 1)
        for writer in writers:
            writer.close()
        await instance.all(LoadModel(), S.LOADED, 1)
        await instance.all(StartWarmup(), S.READY, 1)
        assert await ask(instance)
        assert "connection refused: 127." in first.log
        assert all(r.failure is None for pod in instance.pods for r in pod.reports)
