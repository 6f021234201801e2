"""What the supervisor and its engine say to each other.

One socketpair; each side writes one JSON object a line. The engine gets its end as file descriptor
`int(os.environ[FD_VARIABLE])`. EOF means that the other side is gone: the engine then ends itself, the supervisor
waits for the exit status. Beside it, shared memory (`progress.py`) holds what must be readable while the engine is
frozen.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from mlx_operator_api.base import Lenient
from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Peer, Sharding

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


# -- supervisor → engine
class Connect(Lenient):
    """Form the group of this epoch. Answered by `Connected`, with `WaitingFor` on the way."""

    kind: Literal["Connect"] = "Connect"
    epoch: int
    rank: int
    world_size: int
    sharding: Sharding
    peers: tuple[Peer, ...]
    """All ranks, this one included, by rank."""
    listen_host: str = "0.0.0.0"  # noqa: S104 (peers dial the pod's address)
    token: str
    """Shared secret of the instance, for the handshake between engines."""
    model_digest: str | None = None
    deadline: float
    """Seconds."""


class Load(Lenient):
    """Load this rank's shard. Answered by `Loaded`, with `LayerLoaded` on the way."""

    kind: Literal["Load"] = "Load"
    path: str
    """Directory with config.json and safetensors files."""
    adapter: str | None = None
    """Directory with adapter_config.json and adapters.safetensors."""
    served_name: str
    rank: int
    world_size: int
    sharding: Sharding
    max_concurrent_requests: int
    max_tokens: int | None = None
    context_length: int | None = None
    prompt_cache_bytes: int | None = None
    """For reusing prompts; None: the engine's default."""
    memory_limit_bytes: int | None = None
    """Of this rank's container."""
    spare_bytes: int = 0
    """Of that limit, what a spare engine beside this one will take."""
    memory_limits: tuple[int | None, ...] = ()
    """Of all ranks, by rank; empty: not known, taken to be alike."""


class Warmup(Lenient):
    """Run the first forward passes. A rank > 0 answers `WarmedUp` when rank 0 says that its warm-up is done."""

    kind: Literal["Warmup"] = "Warmup"
    second_lane_rows: int | None = None
    """What an earlier engine of the same work said in `WarmedUp`: not measured again. None: rank 0 measures."""


class Generate(Lenient):
    """One request (rank 0). Answered by `Accepted` or `Refused`, then `Delta`s, then `Finished`."""

    kind: Literal["Generate"] = "Generate"
    id: str
    messages: tuple[dict[str, Any], ...] | None = None
    """Chat: OpenAI messages, for the model's chat template."""
    prompt: str | tuple[int, ...] | None = None
    """Completion: text or token ids."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    resume: tuple[int, ...] = ()
    """Token ids of the answer that an engine gave before it was lost: the answer goes on after them, in the next
    `Delta`. They count in `Finished`."""
    accepted: bool = False
    """A lost engine had accepted it, with these `max_tokens`: a context that follows from memory, which is measured
    anew at each load, refuses and cuts it no more."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """By token id."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    """How many alternatives each token is reported with; None: no logprobs."""
    json_schema: dict[str, Any] | None = None
    """What the answer must follow."""
    tools: tuple[dict[str, Any], ...] = ()
    """OpenAI's, for the model's chat template."""
    tool_choice: Literal["auto", "required"] = "auto"
    tool_name: str | None = None
    """With `required`: the one that must be called."""
    parallel_tool_calls: bool = True
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: str | None = None


class Tokenize(Lenient):
    """Tokens of a prompt (rank 0). Answered by `Tokenized` or `Refused`."""

    kind: Literal["Tokenize"] = "Tokenize"
    id: str
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    template_options: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Lenient):
    """Text of tokens (rank 0). Answered by `Detokenized` or `Refused`."""

    kind: Literal["Detokenize"] = "Detokenize"
    id: str
    tokens: tuple[int, ...]


class Cancel(Lenient):
    """The client left: free the request's slot and memory on every rank."""

    kind: Literal["Cancel"] = "Cancel"
    id: str


class Goodbye(Lenient):
    """End in good order: rank 0 tells the others by a frame; the process exits 0."""

    kind: Literal["Goodbye"] = "Goodbye"


Command = Annotated[
    Connect | Load | Warmup | Generate | Tokenize | Detokenize | Cancel | Goodbye, Field(discriminator="kind")
]


# -- engine → supervisor
class Started(Lenient):
    """Imports are done; commands are read."""

    kind: Literal["Started"] = "Started"
    pid: int
    device: str
    """`cpu` or `gpu`, as MLX says."""
    blas: str
    """Where BLAS comes from, for a person: `openblas` or `bundled`."""


class WaitingFor(Lenient):
    """Ranks whose connection is still missing; sent when it changes."""

    kind: Literal["WaitingFor"] = "WaitingFor"
    ranks: tuple[int, ...]


class Connected(Lenient):
    """Every connection of this rank stands and has shaken hands for this epoch (and the ring, for Tensor)."""

    kind: Literal["Connected"] = "Connected"


class LayerLoaded(Lenient):
    """Progress of loading, at most once per layer."""

    kind: Literal["LayerLoaded"] = "LayerLoaded"
    loaded: int
    total: int
    layers: str
    """Layers of this shard, such as `0-11`."""


class Loaded(Lenient):
    """The shard is in memory and complete."""

    kind: Literal["Loaded"] = "Loaded"
    layers: str
    layers_total: int
    bytes: int
    """Of this shard."""
    note: str | None = None
    """Said in status where it matters, such as `cast from bfloat16 to float32 on CPU`."""


class WarmedUp(Lenient):
    """The warm-up is done on all ranks."""

    kind: Literal["WarmedUp"] = "WarmedUp"
    second_lane_rows: int | None = None
    """From how many requests on there are two lanes (rank 0 of a pipeline); None: there is only one."""


class Accepted(Lenient):
    """The request has a place."""

    kind: Literal["Accepted"] = "Accepted"
    id: str
    prompt_tokens: int
    max_tokens: int | None = None
    """Of the answer, as it was decided: a request that another engine goes on with keeps them."""


class Refused(Lenient):
    """The request is not valid for this model, or cannot be served: an HTTP error in OpenAI's shape."""

    kind: Literal["Refused"] = "Refused"
    id: str
    status: int = 400
    code: str
    """OpenAI's, such as `context_length_exceeded`."""
    param: str | None = None
    message: str


class Likelihood(Lenient):
    """A token and its logprob. `bytes` is None where the token holds a part of a character."""

    token: str
    bytes: tuple[int, ...] | None = None
    logprob: float


class TokenLogprobs(Likelihood):
    """A token of an answer, with the most likely alternatives."""

    top: tuple[Likelihood, ...] = ()


class ToolCall(Lenient):
    """A call that the model has written out. `index` counts from 0 in an answer."""

    index: int
    id: str
    name: str
    arguments: str
    """JSON."""


class Delta(Lenient):
    """New text of a request. `tokens` are the ids behind it (also when the text is still held back)."""

    kind: Literal["Delta"] = "Delta"
    id: str
    text: str
    tokens: tuple[int, ...]
    reasoning: str = ""
    """Text between the model's think tokens; not part of `text`."""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `tokens`, the end of a sequence aside, where they were asked for."""


class Finished(Lenient):
    """The request is done."""

    kind: Literal["Finished"] = "Finished"
    id: str
    finish_reason: Literal["stop", "length", "tool_calls", "cancelled"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt: taken from the prefix cache instead of being computed."""
    reasoning_tokens: int = 0
    """Of the completion tokens."""


class Tokenized(Lenient):
    """The tokens of a prompt."""

    kind: Literal["Tokenized"] = "Tokenized"
    id: str
    tokens: tuple[int, ...]
    max_model_len: int
    token_strs: tuple[str, ...] | None = None


class Detokenized(Lenient):
    """The text of tokens."""

    kind: Literal["Detokenized"] = "Detokenized"
    id: str
    prompt: str


class Failure(Lenient):
    """The engine cannot go on; it ends itself right after with `FAILURE_EXIT_CODE`."""

    kind: Literal["Failure"] = "Failure"
    reason: Reason
    message: str
    """What happened, with the first meaningful line of evidence; no rank, pod or next step."""
    peer: int | None = None
    """The rank that is accused, with PeerLost."""
    diagnostics: tuple[str, ...] = ()


class Notice(Lenient):
    """One line for the pod's log."""

    kind: Literal["Notice"] = "Notice"
    level: Literal["info", "warning"]
    text: str


Event = Annotated[
    Started
    | WaitingFor
    | Connected
    | LayerLoaded
    | Loaded
    | WarmedUp
    | Accepted
    | Refused
    | Delta
    | Finished
    | Tokenized
    | Detokenized
    | Failure
    | Notice,
    Field(discriminator="kind"),
]

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
