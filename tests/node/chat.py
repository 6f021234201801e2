"""Talks to an instance as its users do: the official openai client, through the Service."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openai import OpenAI, OpenAIError

from mlx_operator_api import names
from tests.node.instance import Instance
from tests.node.kube import wait_for


@dataclass(frozen=True)
class Questions:
    """The demo model's trained questions; answers and token counts of a single mlx-lm process."""

    answers: dict[str, str]
    token_counts: dict[str, int]


@contextmanager
def client(cluster: Any, instance: Instance, *, retries: int = 0, timeout: float = 90) -> Iterator[OpenAI]:
    """A client whose connections go through the instance's Service from one of the nodes."""
    service = wait_for(
        "the Service has an address",
        lambda: instance.kubectl.get("service", names.service_name(instance.name), instance.namespace),
        30,
    )
    address = service["spec"]["clusterIP"]
    with cluster.forward(address, names.PUBLIC_PORT) as (host, port):
        openai = OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=retries, timeout=timeout)
        try:
            # kube-proxy writes a Service's rules up to a second after its endpoint is Ready.
            wait_for("the Service leads to rank 0", lambda: _answers(openai), 30)
            yield openai
        finally:
            openai.close()


def _answers(openai: OpenAI) -> bool:
    try:
        return bool(openai.models.list().data)
    except OpenAIError:
        return False


def ask(openai: OpenAI, model: str, question: str, **options: Any) -> str:
    """The answer to one question, greedy."""
    reply = openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, **options
    )
    return reply.choices[0].message.content or ""


def ask_streaming(openai: OpenAI, model: str, question: str) -> str:
    """The same by server-sent events."""
    return "".join(stream_of(openai, model, question))


def stream_of(openai: OpenAI, model: str, question: str) -> Iterator[str]:
    """The answer's parts as they come, none of them empty."""
    parts = openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, stream=True
    )
    return (part.choices[0].delta.content for part in parts if part.choices and part.choices[0].delta.content)
