"""Frames: what rank 0 tells every other rank to compute next.

A frame is one msgpack array of integers and arrays of integers: `[epoch, sequence, lane, [operation, …]]`, each
operation `[code, …]`. Nothing else is ever decoded from the network; sizes are bounded; sequence numbers have no gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

MAX_BYTES = 16 * 1024 * 1024
"""Of one frame: more than a million token ids."""
_MAX_DEPTH = 5


class FrameError(Exception):
    """A frame that rank 0 never sends."""


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Prefill what is left of short prompts together (all but the last token, padded right); they join the lane."""

    uids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Prefill one part of a long prompt into a cache of its own."""

    uid: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """The cache of a long prompt is complete but for its last token: its row joins the lane."""

    uid: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep these rows of the lane, in this order; all others leave."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the cache of a prompt that has not joined."""

    uid: int


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: the next token of every row of the lane."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The decode step of a lane that was empty before this frame: the prompts that join it are computed to their ends.

    One pass instead of two: reading the weights is most of what a step costs.
    """

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Take:
    """Begin the cache of a prompt with the first positions of an entry of the prefix cache."""

    uid: int
    entry: int
    positions: int


@dataclass(frozen=True, slots=True)
class Save:
    """Copy the cache of a row of the lane into an entry of the prefix cache."""

    row: int
    entry: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Free an entry of the prefix cache."""

    entry: int


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """Rank 0's warm-up is done."""


@dataclass(frozen=True, slots=True)
class ClearCache:
    """Nothing is under way: give freed memory back."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The group ends in good order. Answered on the same connection by `GOODBYE_ANSWER`."""


Operation = (
    PrefillBatch
    | PrefillChunk
    | Join
    | Keep
    | Drop
    | Step
    | WarmedUp
    | ClearCache
    | Goodbye
    | Take
    | Save
    | Forget
    | FirstStep
)

GOODBYE_ANSWER = b"bye"

_CODES: tuple[type[Operation], ...] = (
    PrefillBatch,
    PrefillChunk,
    Join,
    Keep,
    Drop,
    Step,
    WarmedUp,
    ClearCache,
    Goodbye,
    Take,
    Save,
    Forget,
    FirstStep,
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One turn of the group: what happens to one lane of rows that decode together."""

    epoch: int
    sequence: int
    operations: tuple[Operation, ...]
    lane: int = 0

    @property
    def step(self) -> Step | FirstStep | None:
        """Its decode step, which is always last."""
        last = self.operations[-1] if self.operations else None
        return last if isinstance(last, Step | FirstStep) else None


def encode(frame: Frame) -> bytes:
    """As bytes for the wire.

    Raises:
        FrameError: it is too big.
    """
    operations = []
    for operation in frame.operations:
        fields = [getattr(operation, name) for name in operation.__slots__]
        operations.append([_CODES.index(type(operation)), *fields])
    raw: bytes = msgpack.packb([frame.epoch, frame.sequence, frame.lane, operations])
    if len(raw) > MAX_BYTES:
        raise FrameError(f"a frame of {len(raw)} bytes is larger than {MAX_BYTES}")
    return raw


def decode(raw: bytes | bytearray) -> Frame:
    """Read a frame.

    Raises:
        FrameError: it is none.
    """
    try:
        value = msgpack.unpackb(raw, use_list=False)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise FrameError(f"undecodable frame of {len(raw)} bytes: {error}") from error
    _only_integers(value)
    match value:
        case (int(epoch), int(sequence), int(lane), tuple(operations)):
            return Frame(epoch, sequence, tuple(_operation(operation) for operation in operations), lane)
    raise FrameError(f"no frame: {str(value)[:80]}")


def _only_integers(value: Any, depth: int = 0) -> None:
    if isinstance(value, tuple) and depth < _MAX_DEPTH:
        for item in value:
            _only_integers(item, depth + 1)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise FrameError(f"a frame holds integers only, not {str(value)[:40]!r}")


def _operation(value: Any) -> Operation:
    match value:
        case (0, tuple(uids), tuple(prompts)) if len(uids) == len(prompts):
            return PrefillBatch(_integers(uids), tuple(_integers(prompt) for prompt in prompts))
        case (1, int(uid), tuple(tokens)):
            return PrefillChunk(uid, _integers(tokens))
        case (2, int(uid)):
            return Join(uid)
        case (3, tuple(rows)):
            return Keep(_integers(rows))
        case (4, int(uid)):
            return Drop(uid)
        case (5, tuple(tokens)):
            return Step(_integers(tokens))
        case (6,):
            return WarmedUp()
        case (7,):
            return ClearCache()
        case (8,):
            return Goodbye()
        case (9, int(uid), int(entry), int(positions)):
            return Take(uid, entry, positions)
        case (10, int(row), int(entry)):
            return Save(row, entry)
        case (11, int(entry)):
            return Forget(entry)
        case (12, tuple(tokens)):
            return FirstStep(_integers(tokens))
    raise FrameError(f"no operation: {str(value)[:80]}")


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(isinstance(item, int) for item in value):
        raise FrameError(f"not an array of integers: {str(value)[:80]}")
    return value


def area(prompts: Sequence[Sequence[int]]) -> int:
    """Positions that a padded batch of these prompts computes."""
    return len(prompts) * max((len(prompt) - 1 for prompt in prompts), default=0)
