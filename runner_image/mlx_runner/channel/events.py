"""What the engine says to its supervisor."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_operator_api.base import Lenient
from mlx_operator_api.conditions import Reason


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
