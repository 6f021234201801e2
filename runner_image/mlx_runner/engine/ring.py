"""MLX's ring of a tensor group: forming it, and making its sockets notice a lost peer.

Ranks 0..n-2 first accept their left neighbour and then connect to the right one; rank n-1 first connects to rank 0 and
then accepts. `init` holds the GIL while it blocks and its accept has no timeout: nothing else of this process runs
meanwhile, so whatever must be said is said before, and the supervisor owns the deadline.
"""

import json
import os
import select
import socket
import stat
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_operator_api.conditions import Reason
from mlx_operator_api.names import ring_port
from mlx_runner.channel import Connect

from .connection import tune
from .failures import EngineError

MARK = "[ring]"
"""What MLX begins the errors of a ring with."""
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def form(connect: Connect, on_lost: Callable[[int, str], None]) -> Any:
    """Join the ring of this epoch and watch its sockets; MLX's group.

    Raises:
        EngineError: the ring could not be formed.
    """
    before = _sockets()
    # In memory: the root file system is read-only.
    with os.fdopen(os.memfd_create("hostfile"), "w") as hostfile:
        json.dump(hosts(connect), hostfile)
        hostfile.flush()
        os.environ["MLX_HOSTFILE"] = f"/proc/self/fd/{hostfile.fileno()}"
        os.environ["MLX_RANK"] = str(connect.rank)
        try:
            group = mx.distributed.init(backend="ring", strict=True)
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0]
            right = connect.peers[neighbours(connect)[1]]
            message = f"{first}; the right neighbour is rank {right.rank} at {right.pod_ip}:{ring_port(connect.epoch)}"
            raise EngineError(Reason.CONNECT_FAILED, message) from error
    _watch(connect, _sockets() - before, on_lost)
    return group


def hosts(connect: Connect) -> list[list[str]]:
    """MLX's host file: this rank listens on its own address, the others are found by theirs."""
    port = ring_port(connect.epoch)
    return [[f"{connect.listen_host if peer.rank == connect.rank else peer.pod_ip}:{port}"] for peer in connect.peers]


def neighbours(connect: Connect) -> tuple[int, int]:
    """The ranks to the left, which dials this one, and to the right, which this one dials."""
    return (connect.rank - 1) % connect.world_size, (connect.rank + 1) % connect.world_size


def _sockets() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
        except OSError:
            continue  # the descriptor of the listing itself
    return found


def _connected(sock: socket.socket) -> bool:
    """MLX leaves the socket of each failed attempt to connect open."""
    try:
        return sock.family == socket.AF_INET and bool(sock.getpeername())
    except OSError:
        return False


def _watch(connect: Connect, descriptors: set[int], on_lost: Callable[[int, str], None]) -> None:
    """Tune the ring's sockets, and name the neighbour when one of them closes: MLX's own error names nobody."""
    port = ring_port(connect.epoch)
    peers: dict[int, tuple[socket.socket, int]] = {}
    poll = select.poll()
    for descriptor in descriptors:
        # A duplicate: MLX closes its own when it notices, and the number might be used again.
        duplicate = socket.socket(fileno=os.dup(descriptor))
        if not _connected(duplicate):
            duplicate.close()
            continue
        tune(duplicate)
        accepted = duplicate.getsockname()[1] == port
        neighbour = neighbours(connect)[0 if accepted else 1]
        peers[duplicate.fileno()] = (duplicate, neighbour)
        poll.register(duplicate, _GONE)

    def watch() -> None:
        for descriptor, _ in poll.poll():
            _, neighbour = peers[descriptor]
            on_lost(neighbour, f"connection to rank {neighbour} lost (ring)")

    threading.Thread(target=watch, name="ring-watch", daemon=True).start()
