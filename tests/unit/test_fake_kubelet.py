"""What the tests of the API server stand on: which process is whose, how a pod ends, and whose port is whose."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from mlx_operator.act.resources import PODS
from tests.apiserver import harness, ports
from tests.apiserver.kubelet import Kubelet
from tests.apiserver.pod_process import Container, children_of
from tests.unit.fakekube import FakeKube

POD: dict[str, Any] = {"metadata": {"name": "tiny-0", "namespace": "default", "uid": "pod-0"}}
DELETED = {"metadata": POD["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
STUBBORN = "import signal; signal.signal(signal.SIGTERM, lambda *_: None); print('up', flush=True); input()"


def started_at(proc: Path, pid: int, ticks: int) -> None:
    (proc / str(pid)).mkdir()
    fields = ["S", *("0" for _ in range(18)), str(ticks), "0"]
    (proc / str(pid) / "stat").write_text(f"{pid} (an (odd) name) {' '.join(fields)}\n")


def test_the_oldest_child_comes_first_also_where_the_numbers_of_processes_began_anew(tmp_path: Path) -> None:
    threads = tmp_path / "1" / "task"
    for number, children in ((1, "4711 12 "), (2, "99 ")):
        (threads / str(number)).mkdir(parents=True)
        (threads / str(number) / "children").write_text(children)
    for pid, ticks in ((4711, 1000), (99, 1500), (12, 2000)):
        started_at(tmp_path, pid, ticks)
    assert children_of(1, tmp_path) == [4711, 99, 12]


def test_a_thread_that_has_just_ended_hides_no_child_of_the_others(tmp_path: Path) -> None:
    threads = tmp_path / "1" / "task"
    for number in (1, 2, 3):
        (threads / str(number)).mkdir(parents=True)
    (threads / "3" / "children").write_text("12 13 ")
    started_at(tmp_path, 12, 1000)
    assert children_of(1, tmp_path) == [12]
    assert children_of(5, tmp_path) == []


@pytest.fixture
def kube() -> FakeKube:
    made = FakeKube()
    made.put(PODS, POD)
    return made


@pytest_asyncio.fixture
async def kubelet(kube: FakeKube, tmp_path: Path) -> AsyncIterator[Kubelet]:
    async with aiohttp.ClientSession() as session:
        async with Kubelet(kube, session, "http://127.0.0.1:1", "default", tmp_path) as made:
            yield made
        assert [task for task in asyncio.all_tasks() if task.get_name() == "terminate"] == []


async def running(kubelet: Kubelet) -> asyncio.subprocess.Process:
    """A container that SIGTERM does not end; a line to its input does."""
    container = Container("pod-0", "default", "tiny-0", "127.0.0.1", "n1", POD)
    container.process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STUBBORN, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    kubelet.containers["pod-0"] = container
    assert container.process.stdout is not None
    await container.process.stdout.readline()
    return container.process


async def ending(kubelet: Kubelet) -> None:
    async def begun() -> bool:
        return "pod-0" not in kubelet.containers

    await kubelet._seen(DELETED)
    await harness.eventually(begun, "the pod is being ended", 10)


async def test_a_pod_stays_for_as_long_as_its_process_whatever_is_told_of_it(kubelet: Kubelet, kube: FakeKube) -> None:
    process = await running(kubelet)
    await ending(kubelet)
    await kubelet._seen(DELETED)
    assert kube.count("delete", "pods") == 0
    assert process.stdin is not None
    process.stdin.write(b"\n")

    async def gone() -> bool:
        return kube.count("delete", "pods") == 1

    await harness.eventually(gone, "the pod is deleted", 10)
    assert process.returncode == 0


async def test_the_kubelet_ends_with_no_pod_half_ended(kubelet: Kubelet) -> None:
    process = await running(kubelet)
    await ending(kubelet)
    await kubelet.__aexit__()
    assert process.returncode is not None


def test_no_port_is_given_twice_also_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ports.free_port()
    few = range(first, first + 8)
    script = f"from tests.apiserver import ports; ports.PORTS = range({few.start}, {few.stop}); "
    script += "print(ports.free_port(), flush=True); input()"
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        monkeypatch.setattr(ports, "PORTS", few)
        ours = [ports.free_port() for _ in range(4)]
        other.communicate("\n")
    assert len({first, theirs, *ours}) == 6
