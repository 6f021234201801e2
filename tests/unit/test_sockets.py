"""What the kernel's table of TCP sockets tells: who listens, and whose connections are never completed."""

import socket
from pathlib import Path

import pytest

from mlx_runner import sockets

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
REST = "     0        0 4711 1 0000000000000000 100 0 0 10 0\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "tcp"
    rows = [
        ("0300007F:1FA7 00000000:0000 0A", "00:00000000 00000000"),
        ("00000000:1FA8 00000000:0000 0A", "00:00000000 00000000"),
        ("00000000:1FA9 0300007F:0001 01", "00:00000000 00000000"),
        ("0107D50A:1F92 0207D50A:B2C4 03", "01:00000063 00000002"),  # our answer was sent twice more
        ("0107D50A:1F92 0307D50A:B2C4 03", "01:00000063 00000000"),  # it is just being completed
        ("0107D50A:1F93 0407D50A:B2C4 03", "01:00000063 00000001"),  # another port
        ("0107D50A:1F92 0507D50A:B2C4 01", "02:00000063 00000003"),
    ]
    lines = [f"   {n}: {place} 00000000:00000000 {timer} {REST}" for n, (place, timer) in enumerate(rows)]
    path.write_text(HEAD + "".join(lines) + "\n")
    return path


def test_a_listening_port_is_seen_in_the_kernels_table(table: Path) -> None:
    assert sockets.listens(8103, "127.0.0.3", table)
    assert not sockets.listens(8103, "127.0.0.4", table)
    assert sockets.listens(8104, "127.0.0.4", table), "a socket at every address"
    assert not sockets.listens(8105, "127.0.0.3", table), "a connection is no listener"
    assert not sockets.listens(8105, "127.0.0.3", table.with_name("none"))


def test_connections_that_our_answer_does_not_reach_are_seen_with_their_address(table: Path) -> None:
    assert sockets.half_open(8082, table) == frozenset({"10.213.7.2"})
    assert sockets.half_open(8081, table) == frozenset()
    assert sockets.half_open(8082, table.with_name("none")) is None


def test_the_table_of_this_machine_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert sockets.listens(port, "127.0.0.1")
        assert sockets.half_open(port) == frozenset()
    assert not sockets.listens(port, "127.0.0.1")
