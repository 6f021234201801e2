"""Clients of the public API, and what they look at."""

import asyncio
import io
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import openai

from mlx_operator_api import names

from .fake_engine import ANSWER
from .supervisors import PATIENCE, Group, Pod

TEXT = " ".join(ANSWER)
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
CHAT = {"model": "tiny", "messages": HELLO}


def client(instance: Group) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=instance.base_url, api_key="unused", max_retries=0, timeout=PATIENCE)


async def post(pod: Pod, body: Any, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any], str | None]:
    """Status, JSON and Retry-After."""
    data = body if isinstance(body, str) else json.dumps(body)
    async with pod.http.post(pod.url(path, names.PUBLIC_PORT), data=io.BytesIO(data.encode())) as response:
        return response.status, await response.json(), response.headers.get("Retry-After")


async def kill_engine(pod: Pod, number: signal.Signals = signal.SIGKILL) -> None:
    for engine in pod.engines():
        os.kill(engine, number)


async def events(pod: Pod, body: Any, lines: list[str]) -> None:
    """Everything of a stream, line by line."""
    url = pod.url("/v1/chat/completions", names.PUBLIC_PORT)
    async with pod.http.post(url, json={**body, "stream": True}) as response:
        assert response.status == 200
        async for raw in response.content:
            if line := raw.decode().strip():
                lines.append(line)


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def metric(pod: Pod, line: str) -> None:
    """Wait until /metrics has a line."""
    deadline = time.monotonic() + PATIENCE
    while True:
        async with pod.http.get(pod.url("/metrics")) as response:
            text = await response.text()
        if line in text.splitlines():
            return
        assert time.monotonic() < deadline, text
        await asyncio.sleep(0.05)


async def value(pod: Pod, name: str) -> float:
    async with pod.http.get(pod.url("/metrics")) as response:
        lines = (await response.text()).splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)
