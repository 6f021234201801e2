"""What the supervisor and its engine say to each other.

One socketpair; each side writes one JSON object a line. The engine gets its end as file descriptor
`int(os.environ[FD_VARIABLE])`. EOF means that the other side is gone: the engine then ends itself, the supervisor
waits for the exit status. Beside it, shared memory (`progress.py`) holds what must be readable while the engine is
frozen.
"""

import json
import re

from pydantic import TypeAdapter

from mlx_operator_api.base import Lenient

from .commands import Cancel, Command, Connect, Detokenize, Generate, Goodbye, Load, Tokenize, Warmup
from .events import (
    Accepted,
    Connected,
    Delta,
    Detokenized,
    Event,
    Failure,
    Finished,
    LayerLoaded,
    Likelihood,
    Loaded,
    Notice,
    Refused,
    Started,
    Tokenized,
    TokenLogprobs,
    ToolCall,
    WaitingFor,
    WarmedUp,
)

__all__ = [
    "BACKGROUND_VARIABLE",
    "ENGINE_NAME",
    "FAILURE_EXIT_CODE",
    "FD_VARIABLE",
    "INTERNAL_ERROR",
    "MAX_EVENT_BYTES",
    "PROGRESS_VARIABLE",
    "SPARE_NAME",
    "Accepted",
    "Cancel",
    "Command",
    "Connect",
    "Connected",
    "Delta",
    "Detokenize",
    "Detokenized",
    "EncodingError",
    "Event",
    "Failure",
    "Finished",
    "Generate",
    "Goodbye",
    "LayerLoaded",
    "Likelihood",
    "Load",
    "Loaded",
    "Notice",
    "Refused",
    "Started",
    "TokenLogprobs",
    "Tokenize",
    "Tokenized",
    "ToolCall",
    "WaitingFor",
    "WarmedUp",
    "Warmup",
    "asker",
    "decode_command",
    "decode_event",
    "encode",
]

FD_VARIABLE = "MLX_RUNNER_CHANNEL_FD"
PROGRESS_VARIABLE = "MLX_RUNNER_PROGRESS_FILE"
BACKGROUND_VARIABLE = "MLX_RUNNER_BACKGROUND"
"""Set for an engine that is started while another one serves: its imports must not be felt."""
SPARE_NAME = "mlx-spare"
"""Name of the process (`ps -o comm`) until its first command: it stands by and belongs to no epoch."""
ENGINE_NAME = "mlx-engine"
"""Its name from its first command on."""
FAILURE_EXIT_CODE = 70
"""The engine reported a failure and ended itself (EX_SOFTWARE)."""
MAX_EVENT_BYTES = 16 * 1024 * 1024
"""Of one line from the engine. The supervisor kills one that sends a longer line, so the engine says nothing longer."""
INTERNAL_ERROR = "internal_error"
"""Code of a `Refused` that is no fault of the request."""

_COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)
_EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


_ASKED = re.compile(rb'\{"kind":"(?:Generate|Tokenize|Detokenize)","id":("(?:[^"\\]|\\.)*")')


class EncodingError(ValueError):
    """A message cannot be written as a line."""


def encode(message: Lenient) -> bytes:
    """One line, newline included.

    Raises:
        EncodingError: it holds what JSON cannot: half a surrogate pair, or values nested too deep.
    """
    try:
        return message.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"
    except ValueError as error:
        raise EncodingError(str(error)) from error


def decode_command(line: bytes) -> Command:
    """Read a line from the supervisor.

    Raises:
        pydantic.ValidationError: it is none of ours.
    """
    return _COMMANDS.validate_json(line)


def asker(line: bytes) -> str | None:
    """The id of the request on a line from the supervisor, also where the rest of it cannot be read."""
    found = _ASKED.match(line)
    try:
        return str(json.loads(found[1])) if found else None
    except ValueError:
        return None


def decode_event(line: bytes) -> Event:
    """Read a line from the engine.

    Raises:
        pydantic.ValidationError: it is none of ours.
    """
    return _EVENTS.validate_json(line)
