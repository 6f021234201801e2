"""A network that swallows packets: nobody closes a connection, and still both sides end within seconds."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Sharding
from mlx_runner import channel

from .conftest import PROMPTS
from .engine_ranks import Rank, generate, running

HOSTS = ("10.213.7.1", "10.213.7.2")
LIMIT_SECONDS = 15.0
"""Keepalive and TCP_USER_TIMEOUT give about 5 s; without them it would be many minutes, or for ever."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def can_make_networks() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"mlx-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "exec", name, "true")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return True


pytestmark = pytest.mark.skipif(not can_make_networks(), reason="needs root and network namespaces")


@dataclass(frozen=True)
class Cable:
    """Two networks with a cable between them."""

    names: tuple[str, str]

    @property
    def prefixes(self) -> list[list[str]]:
        return [["ip", "netns", "exec", name] for name in self.names]

    def cut(self) -> None:
        """Packets are lost; no interface goes down, so the kernel of neither side knows."""
        for name in self.names:
            ip("-n", name, "route", "replace", "blackhole", "10.213.7.0/24")
            for host in HOSTS:
                ip("-n", name, "route", "replace", "blackhole", f"{host}/32")


@pytest.fixture
def cable() -> Iterator[Cable]:
    names = (f"mlx-a-{os.getpid()}", f"mlx-b-{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, host in zip(names, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield Cable(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def failure(rank: Rank) -> channel.Failure:
    while not isinstance(event := rank.next(LIMIT_SECONDS), channel.Failure):
        pass
    return event


@pytest.mark.parametrize(("sharding", "busy"), [(Sharding.PIPELINE, False), (Sharding.TENSOR, True)])
def test_ranks_that_are_cut_off_from_each_other_end_within_seconds(
    tmp_path: Path, tiny: Callable[[str], Path], cable: Cable, sharding: Sharding, busy: bool
) -> None:
    with running(tmp_path, 2, sharding, hosts=HOSTS, prefixes=cable.prefixes) as ranks:
        ranks.serve(tiny("qwen2"))
        if busy:
            ranks[0].send(generate("lost", PROMPTS[0], 2000))
            for _ in range(5):
                ranks[0].expect(channel.Delta)
        cable.cut()
        began = time.monotonic()
        for rank in ranks.ranks:
            told = failure(rank)
            assert (told.reason, told.peer) == (Reason.PEER_LOST, 1 - rank.rank), told
            assert rank.exit_code() == channel.FAILURE_EXIT_CODE
        assert time.monotonic() - began < LIMIT_SECONDS
