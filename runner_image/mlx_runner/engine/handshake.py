"""How two ranks make sure of each other before a byte of work passes: challenge, HMAC, and who they are.

    listener → dialer   MAGIC version challenge
    dialer → listener   hello challenge' HMAC(token, "dial" challenge challenge' hello)
    listener → dialer   verdict HMAC(token, "listen" challenge challenge' hello verdict)

The token never crosses the network, nothing is decoded before its HMAC was checked, and an answer cannot be replayed
on another connection. A connection that does not know the token (a port scan, a probe) is closed and forgotten.
"""

import hmac
import secrets
import socket
import struct
from typing import Literal

from pydantic import ValidationError

from mlx_operator_api.base import Strict
from mlx_operator_api.tasks import Sharding

from .connection import read_exactly

VERSION = 1
"""Of this handshake, the frames and the hidden states."""
SECONDS = 5.0
"""For a whole handshake."""
_MAGIC = b"MLXR"
_CHALLENGE = 32
_MAC = 32
_MAX_HELLO = 1024
_SHORT = struct.Struct("<H")
_ACCEPTED = b""

Purpose = Literal["frames", "hidden"]


class Hello(Strict):
    """What the dialer says of itself."""

    epoch: int
    rank: int
    world_size: int
    sharding: Sharding
    purpose: Purpose
    model_digest: str | None = None


class StrangerError(Exception):
    """The other side is none of ours: not our protocol, or another token."""


class RefusedError(Exception):
    """The other side is one of ours, and said why it does not fit."""


def mismatch(mine: Hello, theirs: Hello) -> str | None:
    """Why two ranks do not belong together; None when they do."""
    for field, one, other in (
        ("epoch", mine.epoch, theirs.epoch),
        ("world size", mine.world_size, theirs.world_size),
        ("sharding", mine.sharding, theirs.sharding),
    ):
        if one != other:
            return f"{field} of rank {mine.rank} is {one}, of rank {theirs.rank} {other}"
    if mine.model_digest and theirs.model_digest and mine.model_digest != theirs.model_digest:
        digests = f"{mine.model_digest[:19]}, of rank {theirs.rank} {theirs.model_digest[:19]}"
        return f"model digest of rank {mine.rank} is {digests}"
    return None


def dial(sock: socket.socket, token: str, hello: Hello) -> None:
    """The dialer's side.

    Raises:
        StrangerError: the other side is none of ours.
        RefusedError: it refused, and says why.
        EOFError, OSError: the connection broke.
    """
    greeting = read_exactly(sock, len(_MAGIC) + 1 + _CHALLENGE)
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise StrangerError("it does not speak the protocol of runners")
    if greeting[len(_MAGIC)] != VERSION:
        raise StrangerError(f"it speaks version {greeting[len(_MAGIC)]} of the protocol, this runner {VERSION}")
    theirs = bytes(greeting[-_CHALLENGE:])
    ours = secrets.token_bytes(_CHALLENGE)
    raw = hello.model_dump_json().encode()
    sock.sendall(_SHORT.pack(len(raw)) + raw + ours + _mac(token, b"dial", theirs, ours, raw))
    try:
        verdict = _read_short(sock)
        proof = bytes(read_exactly(sock, _MAC))
    except EOFError as error:
        raise StrangerError("it closed the handshake: another token, or an engine that is ending") from error
    if not hmac.compare_digest(proof, _mac(token, b"listen", theirs, ours, raw, verdict)):
        raise StrangerError("it has another token")
    if verdict != _ACCEPTED:
        raise RefusedError(verdict.decode(errors="replace"))


def listen(sock: socket.socket, token: str, mine: Hello) -> Hello:
    """The listener's side: who has dialled.

    Raises:
        StrangerError: the other side is none of ours.
        RefusedError: it is one of ours and does not fit; it was told why.
        EOFError, OSError: the connection broke.
    """
    ours = secrets.token_bytes(_CHALLENGE)
    sock.sendall(_MAGIC + bytes([VERSION]) + ours)
    raw = _read_short(sock)
    theirs = bytes(read_exactly(sock, _CHALLENGE))
    proof = bytes(read_exactly(sock, _MAC))
    if not hmac.compare_digest(proof, _mac(token, b"dial", ours, theirs, raw)):
        raise StrangerError("it has another token")
    try:
        hello = Hello.model_validate_json(raw)
    except ValidationError as error:
        raise StrangerError("its hello cannot be decoded") from error
    why = mismatch(mine, hello)
    verdict = why.encode() if why else _ACCEPTED
    sock.sendall(_SHORT.pack(len(verdict)) + verdict + _mac(token, b"listen", ours, theirs, raw, verdict))
    if why:
        raise RefusedError(why)
    return hello


def _read_short(sock: socket.socket) -> bytes:
    (length,) = _SHORT.unpack(read_exactly(sock, _SHORT.size))
    if length > _MAX_HELLO:
        raise StrangerError(f"it sent {length} bytes where at most {_MAX_HELLO} belong")
    return bytes(read_exactly(sock, length))


def _mac(token: str, *parts: bytes) -> bytes:
    digest = hmac.new(token.encode(), digestmod="sha256")
    for part in parts:
        digest.update(_SHORT.pack(len(part)) + part)
    return digest.digest()
