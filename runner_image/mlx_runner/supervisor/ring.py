"""Whether a port listens, read from /proc: a connection would be taken for a peer by MLX's ring."""

import socket
import struct
from pathlib import Path

_LISTEN = "0A"
_TCP = Path("/proc/net/tcp")


def listens(port: int, host: str = "0.0.0.0", table: Path = _TCP) -> bool:  # noqa: S104
    """Whether an IPv4 socket of this network namespace listens on `port` at `host` or at every address."""
    wanted = {_hex(host, port), _hex("0.0.0.0", port)}  # noqa: S104
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return False
    for line in lines:
        fields = line.split()
        if len(fields) > 3 and fields[3] == _LISTEN and fields[1] in wanted:
            return True
    return False


def _hex(host: str, port: int) -> str:
    """As the table writes it: the address in the machine's own byte order."""
    (address,) = struct.unpack("=I", socket.inet_aton(host))
    return f"{address:08X}:{port:04X}"
