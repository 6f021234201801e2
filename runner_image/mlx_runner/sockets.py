"""What the kernel tells of TCP sockets of this network namespace without a packet: /proc/net/tcp.

Source: https://docs.kernel.org/networking/proc_net_tcp.html, and `get_openreq4` of net/ipv4/tcp_ipv4.c.
"""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_SYN_RECV, _LISTEN = "03", "0A"
_LOCAL, _REMOTE, _STATE, _RETRANSMITS = 1, 2, 3, 6
"""Columns."""
_TCP = Path("/proc/net/tcp")


def listens(port: int, host: str = "0.0.0.0", table: Path = _TCP) -> bool:  # noqa: S104
    """Whether an IPv4 socket listens on `port` at `host` or at every address.

    A connection would tell it too, but MLX's ring would take that for a peer.
    """
    wanted = {_hex(host, port), _hex("0.0.0.0", port)}  # noqa: S104
    try:
        return any(row[_STATE] == _LISTEN and row[_LOCAL] in wanted for row in _rows(table))
    except OSError:
        return False


def half_open(port: int, table: Path = _TCP) -> frozenset[str] | None:
    """Addresses whose connections to `port` arrive and are not completed: our answer was sent again, and not answered.

    None: the kernel does not say, for want of file descriptors.
    """
    try:
        rows = list(_rows(table))
    except OSError:
        return None
    ours = (row for row in rows if row[_STATE] == _SYN_RECV and row[_LOCAL].endswith(f":{port:04X}"))
    return frozenset(_address(row[_REMOTE]) for row in ours if int(row[_RETRANSMITS], 16) > 0)


def _rows(table: Path) -> Iterator[list[str]]:
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > _RETRANSMITS:
            yield fields


def _hex(host: str, port: int) -> str:
    """As the table writes it: the address in the machine's own byte order."""
    (address,) = struct.unpack("=I", socket.inet_aton(host))
    return f"{address:08X}:{port:04X}"


def _address(text: str) -> str:
    return socket.inet_ntoa(struct.pack("=I", int(text.partition(":")[0], 16)))
