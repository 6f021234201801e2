"""Clients that stream completions over HTTP, the same way from either server."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

_PATIENCE = aiohttp.ClientTimeout(total=600)


@dataclass(slots=True)
class Stream:
    """One request: seconds from its start to its first and last piece of text."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    text: str = ""


@dataclass(slots=True)
class Sample:
    """Some requests that began together, or several times such; `seconds` is the time of all."""

    seconds: float = 0.0
    streams: list[Stream] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the time of the slowest, prefill included."""
        return sum(stream.tokens for stream in self.streams) / self.seconds


async def complete(
    http: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: str,
    tokens: int,
    begun: Callable[[], None] = lambda: None,
) -> Stream:
    """Stream one greedy completion; `begun` is called at its first text."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stream, started = Stream(), time.perf_counter()
    async with http.post(f"{url}/v1/completions", json=body, timeout=_PATIENCE) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            stream.last = time.perf_counter() - started
            if chunk.get("usage"):
                stream.tokens = chunk["usage"]["completion_tokens"]
            text = "".join(choice.get("text") or "" for choice in chunk["choices"])
            if text and not stream.first:
                stream.first = stream.last
                begun()
            stream.text += text
    if not stream.first or not stream.tokens:
        raise RuntimeError(f"{url} gave no text or no usage: {stream}")
    return stream


async def together(url: str, model: str, prompts: Sequence[str], tokens: int) -> Sample:
    """All prompts at once."""
    async with aiohttp.ClientSession() as http:
        started = time.perf_counter()
        streams = await asyncio.gather(*(complete(http, url, model, prompt, tokens) for prompt in prompts))
        return Sample(time.perf_counter() - started, list(streams))


async def in_turn(url: str, model: str, rounds: Sequence[Sequence[str]], tokens: int) -> Sample:
    """Several rounds of prompts, one after the other; the time between them does not count."""
    found = Sample()
    for prompts in rounds:
        sample = await together(url, model, prompts, tokens)
        found.seconds += sample.seconds
        found.streams += sample.streams
    return found


async def late(url: str, model: str, others: Sequence[str], long: str, short: str, delay: float) -> Stream:
    """A short request that comes `delay` seconds after a long prompt, while `others` are being answered."""
    async with aiohttp.ClientSession() as http:
        begun = [asyncio.Event() for _ in others]
        running = [
            asyncio.create_task(complete(http, url, model, prompt, 64, event.set))
            for prompt, event in zip(others, begun, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        running.append(asyncio.create_task(complete(http, url, model, long, 1)))
        await asyncio.sleep(delay)  # what is measured: a client that comes then
        stream = await complete(http, url, model, short, 4)
        await asyncio.gather(*running)
        return stream
