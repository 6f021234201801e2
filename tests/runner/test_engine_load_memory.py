"""The sum of a shard's memory before it is read. In this process: nothing here needs a group."""

import re

import pytest

from mlx_operator_api.conditions import Reason
from mlx_runner.channel import LayerLoaded
from mlx_runner.engine import imports

from . import tiny_models
from .test_engine_load import Tiny, command, load, refused

imports.import_all()

from mlx_runner.engine import load as loading  # noqa: E402
from mlx_runner.engine import memory  # noqa: E402
from mlx_runner.engine.failures import EngineError  # noqa: E402


def test_a_shard_larger_than_the_memory_limit_is_refused_with_the_sum_before_it_is_read(tiny: Tiny) -> None:
    told: list[LayerLoaded] = []
    wanted = command(tiny("qwen2"), memory_limit_bytes=50 << 20, prompt_cache_bytes=3 << 20)
    with pytest.raises(EngineError) as raised:
        loading.load(wanted, None, told.append)
    assert raised.value.reason is Reason.INSUFFICIENT_MEMORY
    number = r"[0-9.]+[KMG]i"
    assert re.match(
        rf"needs {number} = weights 676.2Ki \+ KV 1Mi \(1 x 1024 tokens\) \+ {number} "
        rf"\(process {number}, prompt cache 3Mi, copies and prefill {number}\); limit 50Mi: "
        r"even one short request does not fit",
        raised.value.message,
    ), raised.value.message
    assert told == []


def test_a_context_that_was_asked_for_must_fit_for_all_requests_at_once(tiny: Tiny) -> None:
    free = memory.resident_bytes() + (64 << 20)
    error = refused(tiny("qwen2"), memory_limit_bytes=free, context_length=200_000)
    assert error.reason is Reason.INSUFFICIENT_MEMORY
    assert "KV 782Mi (4 x 200000 tokens)" in error.message
    fitting = re.search(r": spec.serving.contextLength (\d+)", error.message)
    assert fitting, error.message
    # The figure of the message is true.
    shard = load(tiny("qwen2"), memory_limit_bytes=free + (4 << 20), context_length=int(fitting[1]))
    assert (shard.budget.context, shard.budget.tokens) == (int(fitting[1]), None)


def test_where_only_the_prompt_cache_does_not_fit_the_refusal_says_so(tiny: Tiny) -> None:
    error = refused(tiny("qwen2"), memory_limit_bytes=memory.resident_bytes() + (128 << 20), prompt_cache_bytes=1 << 30)
    assert error.reason is Reason.INSUFFICIENT_MEMORY
    assert "prompt cache 1Gi" in error.message
    assert error.message.endswith(": spec.serving.promptCacheBytes 0 would fit")


def test_without_a_context_the_requests_share_what_memory_there_is(tiny: Tiny) -> None:
    shard = load(tiny("qwen2"), memory_limit_bytes=1 << 30)
    assert (shard.budget.context, shard.budget.tokens, shard.loaded.note) == (tiny_models.CONTEXT, None, None)
    shard = load(tiny("qwen2"), memory_limit_bytes=int(memory.resident_bytes() * 1.05) + (52 << 20))
    tokens = shard.budget.tokens
    assert tokens is not None
    assert 1024 <= tokens < 4 * tiny_models.CONTEXT
    assert tokens % 256 == 0
    assert shard.budget.context == min(tokens, tiny_models.CONTEXT)
    note = f"memory for {tokens} tokens in work at once, {shard.budget.context} in one request"
    assert shard.loaded.note == note


def test_the_rank_with_the_least_memory_bounds_what_all_take(tiny: Tiny) -> None:
    small = int(memory.resident_bytes() * 1.05) + (52 << 20)
    for own in (0, 1):
        limits = tuple(small if rank != own else 1 << 30 for rank in range(2))
        shard = load(tiny("qwen2"), own, 2, memory_limit_bytes=1 << 30, memory_limits=limits)
        assert shard.budget.tokens is not None
