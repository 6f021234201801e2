"""What the supervisor says to its engine."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_operator_api.base import Lenient
from mlx_operator_api.tasks import Peer, Sharding


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
