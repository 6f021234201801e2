"""Ports of loopback for operators, each given to one of them only."""

import errno
import random
import socket
from typing import Any

PORTS = range(10000, 20000)
"""Of operators: below the kernel's range for outgoing connections, and beside those of the API servers."""


def free_port() -> int:
    """A port that is free now, and that nobody else is given before somebody listens on it.

    No outgoing connection, and no other caller of this, in whatever process, while this process lives.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            if _bound(probe, ("127.0.0.1", port)) and _claimed(port):
                return port
    raise AssertionError(f"no free port of 127.0.0.1 in {PORTS}")


def _claimed(port: int) -> bool:
    """Take a name that the kernel gives to one process at a time, and takes back when that ends."""
    with socket.socket(socket.AF_UNIX) as claim:
        if not _bound(claim, f"\0mlx-operator-tests-port-{port}"):
            return False
        claim.detach()  # kept open
        return True


def _bound(to: socket.socket, address: Any) -> bool:
    try:
        to.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True
