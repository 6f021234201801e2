"""What is missing on a machine is said in one sentence with the remedy, before anything is started."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cgroups, prerequisites
from tests.cluster.cli import main
from tests.cluster.cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.cluster.paths import ClusterPaths, cache_root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_OPERATOR_CACHE", str(tmp_path / "c"))
    return tmp_path / "c"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_without_root_the_remedy_is_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="need root: run this again with sudo"):
        prerequisites.check_cluster(Path("/tmp/x"))


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites, "find_program", lambda name: None if name in {"runc", "nft"} else f"/bin/{name}")
    assert prerequisites.missing_programs() == [
        "Missing from PATH: nft, runc; install with `apt-get install nftables runc`."
    ]


def test_programs_in_the_systems_folders_are_found_without_them_in_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prerequisites.find_program("mount") is not None


def test_missing_cgroup_controllers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    for name in ("cpu", "cpuacct", "cpuset", "memory", "devices", "pids"):
        (tmp_path / name).mkdir()
    assert cgroups.missing_controllers() == ["freezer"]
    assert any("freezer are not mounted" in sentence for sentence in prerequisites.missing_kernel())


def test_a_full_disk_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites, "DISK_NEEDED_BYTES", 1 << 60)
    [sentence] = prerequisites.missing_space(tmp_path / "not" / "yet")
    assert sentence.startswith(f"{tmp_path} has ")
    assert "set MLX_OPERATOR_CACHE to a folder on a larger disk" in sentence


def test_a_port_in_use_is_refused_and_a_free_one_is_not(taken: int) -> None:
    assert prerequisites.taken_port(taken) == [
        f"Port {taken} of 127.0.0.1 is in use: choose another with --port, or leave --port out to get a free one."
    ]
    assert prerequisites.taken_port(0) == []


@pytest.mark.parametrize("place", ["/run/cache", "/var/lib/cache", "/var/log/cache"])
def test_a_cache_that_nodes_could_not_see_is_refused(place: str) -> None:
    [sentence] = prerequisites.misplaced(Path(place))
    assert "private in each node: set MLX_OPERATOR_CACHE to another folder" in sentence


def test_a_path_too_long_for_sockets_is_refused() -> None:
    assert "too long for the Unix sockets" in prerequisites.misplaced(Path("/x" * 40))[0]


def test_everything_missing_is_said_at_once_and_nothing_is_started(
    taken: int, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["up", "--port", str(taken)]) == 1
    said = capsys.readouterr().err
    assert "need root" in said
    assert f"Port {taken}" in said
    assert "Traceback" not in said
    assert not cache.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--name", "A_b", "status"], "a cluster name is 1 to 20 characters"),
        (["up", "--nodes", "0"], "--nodes 0: a cluster has 1 to 20 nodes"),
        (["up", "--nodes", "99"], "--nodes 99: a cluster has 1 to 20 nodes"),
        (["status"], "Cluster 'default' is not there: start it with"),
        (["kubeconfig"], "Cluster 'default' is not there: start it with"),
        (["load-image", "x.tar"], "has no nodes: start it with"),
        (["partition", "web"], "'web' is not a node: nodes are called n1 to n20"),
        (["stop-node", "n3"], "has no node 'n3'; its nodes: none"),
        (["logs", "nothing"], "'nothing' is not a component; there are etcd, apiserver"),
    ],
)
def test_a_command_that_cannot_be_done_ends_with_a_sentence_and_code_1(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(Cluster, "binaries", tmp_path)
    monkeypatch.setattr(prerequisites, "missing_root", list)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_the_cache_follows_its_variable_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("MLX_OPERATOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/mlx-operator")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "mlx-operator"


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a/b", "..", "A", "x" * 21])
def test_a_name_that_could_escape_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="a cluster name is"):
        ClusterPaths(name)
