"""A group is removed whatever is in it by then."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.cgroups import Group

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes cgroups")


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(f"mlxop-unit-{os.getpid()}/hub")
    group.ensure()
    yield group
    Group(group.name.partition("/")[0]).remove()


def joined(group: Group) -> "subprocess.Popen[bytes]":
    """A program that has joined the group by itself, as those that a cluster starts do."""
    join = f"echo $$ > {group.tracker}/cgroup.procs && echo joined && exec sleep 30"
    process = subprocess.Popen(["sh", "-c", join], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"joined\n"
    return process


def test_a_program_that_joins_after_the_others_were_killed_does_not_keep_the_group(group: Group) -> None:
    first = joined(group)
    group.kill()
    with first, joined(group) as late:
        Group(group.name.partition("/")[0]).remove()
        assert not group.exists()
        late.wait(timeout=10)


def test_what_is_in_the_group_itself_lives_when_only_what_is_below_it_is_removed(group: Group) -> None:
    below = Group(f"{group.name}/system")
    below.ensure()
    with joined(group) as here, joined(below) as there:
        group.remove(keep_top=True)
        assert not below.exists() and group.exists()
        there.wait(timeout=10)
        assert here.poll() is None
        here.kill()
