"""Check of a safetensors file without reading its tensors: header and offsets against the size of the file.

Format: 8 bytes little-endian length N, N bytes JSON, then the data; each tensor's `data_offsets` are relative to the
data's start, and together they cover it without gap or overlap.
"""

import json
import struct
from pathlib import Path

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000
"""As the reference implementation limits it."""
_METADATA = "__metadata__"


class DamagedError(ValueError):
    """What does not fit, with the numbers."""


def tensors(path: Path) -> frozenset[str]:
    """Names of the tensors of a sound file.

    Raises:
        DamagedError: the file is truncated, too long, or no safetensors file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise DamagedError(f"{size} bytes are too few for a safetensors file")
        (length,) = _LENGTH.unpack(start)
        if length > min(_MAX_HEADER, size - _LENGTH.size):
            raise DamagedError(f"its header claims {length} bytes, the file has {size}")
        header = _header(file.read(length))
    return _check(header, size - _LENGTH.size - length)


def _header(raw: bytes) -> dict[str, object]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise DamagedError("its header is no JSON object")
    header.pop(_METADATA, None)
    return header


def _check(header: dict[str, object], data: int) -> frozenset[str]:
    position = 0
    for name, (begin, end) in sorted(_spans(header), key=lambda item: item[1]):
        if begin != position or end < begin:
            raise DamagedError(f"tensor {name!r} lies at {begin}..{end}, expected at {position}")
        if end > data:
            raise DamagedError(f"tensor {name!r} ends at {end} but the file holds {data} bytes of data")
        position = end
    if position != data:
        raise DamagedError(f"its tensors end at {position} but the file holds {data} bytes of data")
    return frozenset(header)


def _spans(header: dict[str, object]) -> list[tuple[str, tuple[int, int]]]:
    spans = []
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(o, int) for o in offsets)):
            raise DamagedError(f"tensor {name!r} has no data_offsets")
        spans.append((name, (offsets[0], offsets[1])))
    return spans
