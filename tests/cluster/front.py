"""Forward a loopback port into a network namespace: listen here, then move over, then connect from there.

Run as a program: ``front.py NAMESPACE_FILE PORT TARGET_HOST:PORT PORT_FILE``. PORT 0 takes any free one, FIRST-LAST one
of a range; the port taken is written to PORT_FILE once connections are accepted. A socket stays in the namespace it was
made in, so the process that listened on loopback of the host connects from inside the cluster.
"""

import asyncio
import ctypes
import errno
import os
import random
import socket
import sys
from pathlib import Path

_CLONE_NEWNET = 0x40000000


def enter_network(namespace: str) -> None:
    """Move this process into a network namespace.

    Raises:
        OSError: there is no such namespace, or no permission.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        # Only this direction is over: the other side may still have an answer to send.
        writer.write_eof()
    except OSError:
        writer.transport.abort()


async def _forward(near: tuple[asyncio.StreamReader, asyncio.StreamWriter], host: str, port: int) -> None:
    try:
        far = await asyncio.open_connection(host, port)
    except OSError as error:
        sys.stderr.write(f"connection to {host}:{port} failed: {error}\n")
        near[1].transport.abort()
        return
    try:
        await asyncio.gather(_pump(near[0], far[1]), _pump(far[0], near[1]))
    finally:
        near[1].close()
        far[1].close()


async def _serve(listener: socket.socket, host: str, port: int, port_file: Path) -> None:
    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _forward((reader, writer), host, port)

    async with await asyncio.start_server(accepted, sock=listener) as server:
        unfinished = port_file.with_name(f"{port_file.name}.new")
        unfinished.write_text(str(listener.getsockname()[1]))
        unfinished.replace(port_file)
        await server.serve_forever()


def listen(ports: str) -> socket.socket:
    """Listen on a port of loopback.

    Args:
        ports: ``PORT``, where 0 is any free one, or ``FIRST-LAST``: a free one of these.

    Raises:
        OSError: the port, or the whole range, is in use.
    """
    first, _, last = ports.partition("-")
    wanted = range(int(first), int(last or first) + 1)
    # In random order: two that start at once seldom want the same.
    for port in random.sample(wanted, len(wanted)):
        try:
            return socket.create_server(("127.0.0.1", port), backlog=256)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"port {ports} of 127.0.0.1: {os.strerror(errno.EADDRINUSE)}")


def main(namespace: str, port: str, target: str, port_file: str) -> None:
    """Forward until killed."""
    host, _, target_port = target.rpartition(":")
    listener = listen(port)
    enter_network(namespace)
    asyncio.run(_serve(listener, host, int(target_port), Path(port_file)))


if __name__ == "__main__":
    main(*sys.argv[1:])
