"""A network that swallows packets, and strangers in it: nobody closes a connection, still both sides end."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from tests.faults import PATIENCE, Fault, Layer, fault

from .conftest import PROMPTS
from .engine_ranks import FAULTY_ENGINE, Rank, generate, running, wait_until

HOSTS = ("10.213.7.1", "10.213.7.2")
BOUND = 10.0
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

    def cut(self, *ranks: int) -> None:
        """What these ranks send is lost; no interface goes down, so the kernel of neither side knows."""
        for rank in ranks:
            name = self.names[rank]
            ip("-n", name, "route", "replace", "blackhole", "10.213.7.0/24")
            for host in HOSTS:
                ip("-n", name, "route", "replace", "blackhole", f"{host}/32")

    def lose(self, rank: int) -> None:
        """What this rank sends leaves its network and is lost at the other end of the cable."""
        rule = ("-n", self.names[1 - rank], "rule")
        # Before the table of local addresses, which stands first.
        ip(*rule, "add", "pref", "100", "lookup", "local")
        ip(*rule, "del", "pref", "0")
        ip(*rule, "add", "pref", "10", "from", f"{HOSTS[rank]}/32", "iif", "eth0", "blackhole")


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
    while not isinstance(event := rank.next(BOUND * PATIENCE), channel.Failure):
        pass
    return event


def cut_off(number: str, what: str, **changes: Any) -> Fault:
    row = Fault(
        id=f"partition-{number}",
        what=what,
        injected="routes of both ranks' networks become black holes",
        layer=Layer.ENGINES,
        rank=None,
        state=None,
        reason=Reason.PEER_LOST,
        says="connection to rank … lost (…",
        within=BOUND,
    )
    return replace(row, **changes)


ONE_WAY = "the routes of rank 1's network become black holes, those of rank 0's stay"


@fault(
    cut_off("idle", "network cut while idle"),
    cut_off("idle-one-way", "network cut in one direction while idle", injected=ONE_WAY),
    cut_off("busy", "network cut while the group answers"),
    cut_off("busy-one-way", "network cut in one direction while the group answers", injected=ONE_WAY),
    cut_off("idle-tensor", "network cut while idle", sharding=Sharding.TENSOR),
    cut_off("busy-tensor", "network cut while the group answers", sharding=Sharding.TENSOR),
    cut_off("loading", "network cut while loading"),
)
def test_ranks_that_are_cut_off_from_each_other_name_each_other_within_seconds(
    tmp_path: Path, tiny: Callable[[str], Path], cable: Cable, row: Fault
) -> None:
    with running(tmp_path, 2, row.sharding, hosts=HOSTS, prefixes=cable.prefixes, program=FAULTY_ENGINE) as ranks:
        if "loading" in row.id:
            ranks.connect()
            for rank in ranks.ranks:
                rank.plan_file.write_text(json.dumps({"at": "read", "do": "slow", "seconds": 60.0}))
                rank.send(ranks.load_command(rank.rank, tiny("qwen2")))
            for rank in ranks.ranks:
                wait_until(Path(f"{rank.plan_file}.reached").exists, PATIENCE, f"rank {rank.rank} reads")
        else:
            ranks.serve(tiny("qwen2"))
        if "busy" in row.id:
            ranks[0].send(generate("lost", PROMPTS[0], 2000))
            for _ in range(5):
                ranks[0].expect(channel.Delta)
        cable.cut(*((1,) if row.injected == ONE_WAY else (0, 1)))
        began = time.monotonic()
        for rank in ranks.ranks:
            told = failure(rank)
            assert told.peer == 1 - rank.rank, told
            row.check(None, told.reason, told.message)
            assert rank.exit_code() == channel.FAILURE_EXIT_CODE
        row.took(time.monotonic() - began)


CONNECTING = Fault(
    id="partition-connecting",
    what="network cut in one direction while connecting",
    injected="what rank 0 sends is lost on its way to rank 1",
    layer=Layer.ENGINES,
    rank=None,
    state=RunnerState.CONNECTING,
    reason=Reason.CONNECT_TIMEOUT,
    says="not connected within … s: still waiting for rank … at …",
    within=40.0,
    then="by itself: the next epoch, in the same pods; rank 0 says that connections arrive and its answers do not",
)


@fault(
    CONNECTING,
    replace(
        CONNECTING,
        id="partition-connecting-other-way",
        injected="what rank 1 sends is lost on its way to rank 0",
        then="by itself: the next epoch, in the same pods; rank 0 says that no connection has arrived",
    ),
)
def test_ranks_that_cannot_reach_each_other_say_whom_they_wait_for_and_what_of_it_arrives(
    tmp_path: Path, cable: Cable, row: Fault
) -> None:
    lost = 0 if row.id == CONNECTING.id else 1
    with running(tmp_path, 2, hosts=HOSTS, prefixes=cable.prefixes) as ranks:
        cable.lose(lost)
        began = time.monotonic()
        for rank in ranks.ranks:
            rank.send(ranks.connect_command(rank.rank, deadline=5.0))
        messages = []
        for rank in ranks.ranks:
            told = failure(rank)
            row.check(row.state, told.reason, told.message)
            messages.append(told.message)
        row.took(time.monotonic() - began)
        seen = "its connections arrive here, the answers to them do not reach it"
        arrived = seen if lost == 0 else "no connection from there has arrived"
        assert messages[0].endswith(f"rank 1 at 10.213.7.2 ({arrived})")
        # Once its neighbour has not answered for some seconds, the kernel says so at once.
        unanswered = ("neither accepted nor refused within 2 s", "no route to host")
        assert messages[1].endswith(tuple(f"rank 0 at 10.213.7.1:8082 ({words})" for words in unanswered))
