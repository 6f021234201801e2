"""Admission webhooks that cannot be reached or do not answer, as the operator tells it."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from mlx_operator.act.resources import Resource
from mlx_operator_api.conditions import ConditionType
from tests.apiserver import injection
from tests.apiserver.harness import Manifest, World
from tests.apiserver.refusing import BOTH, manifest, present, refused, row, told
from tests.faults import Fault, fault

_POLICY = "admissionregistration.k8s.io"
WEBHOOKS = Resource(
    _POLICY, "v1", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration", namespaced=False
)


@fault(
    row(
        "webhook-down",
        "admission webhook out of reach",
        "a ValidatingWebhookConfiguration whose server does not listen",
        "rank 0/2 pod tiny-0: the API server refused the pod (HTTP 500): Internal error occurred: failed calling "
        'webhook "pods.example.com": failed to call webhook: Post "https://127.0.0.1:1/validate?timeout=2s": dial tcp '
        f"127.0.0.1:1: connect: connection refused{BOTH}bring the admission webhook pods.example.com back; it is tried "
        "again by itself",
    )
)
async def test_a_webhook_that_is_down_is_told_and_its_return_is_noticed(place: World, row: Fault) -> None:
    await place.operator()
    async with present(place, WEBHOOKS, webhook(place, "down", {"url": "https://127.0.0.1:1/validate"})):
        await refused(place, "failed calling webhook")
        await told(place, row)
    await place.until_ready()


def webhook(place: World, name: str, where: dict[str, str], seconds: int = 2) -> Manifest:
    """A webhook for the pods of a test."""
    hook: dict[str, Any] = {
        "name": "pods.example.com",
        "clientConfig": where,
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": seconds,
        "failurePolicy": "Fail",
    }
    return manifest(WEBHOOKS, f"{name}-{place.namespace}", webhooks=[hook])


@asynccontextmanager
async def silent_webhook(place: World) -> AsyncIterator[tuple[dict[str, str], list[bytes]]]:
    """A server with a good certificate that takes requests and answers none; where it is, and what it was asked."""
    asked: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(1 << 16):
                asked.append(data)
        writer.close()

    certificate, key = place.server.pki.issue("webhook", user="webhook", hosts=["127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        bundle = base64.b64encode(place.server.pki.ca.read_bytes()).decode()
        yield {"url": f"https://127.0.0.1:{port}/validate", "caBundle": bundle}, asked


@fault(
    row(
        "webhook-slow",
        "admission webhook that does not answer in its time",
        "a ValidatingWebhookConfiguration with `timeoutSeconds: 2` and a server that takes requests and answers none",
        "rank 0/2 pod tiny-0: the API server refused the pod (HTTP 500): Internal error occurred: failed calling "
        'webhook "pods.example.com": failed to call webhook: Post "https://127.0.0.1:…/validate?timeout=2s": context '
        "deadline exceeded; see why the admission webhook pods.example.com does not answer in its time; it is tried "
        "again by itself",
        rank=0,
        who="",
        within=5.0,
    )
)
async def test_a_webhook_that_does_not_answer_is_told_and_only_one_pod_waits_for_it(place: World, row: Fault) -> None:
    await place.operator()
    async with silent_webhook(place) as (where, asked):
        async with present(place, WEBHOOKS, webhook(place, "slow", where)):
            await refused(place, "failed calling webhook")
            await told(place, row)
            assert asked
            tried = {
                request.name for request in place.writes() if (request.verb, request.resource) == ("create", "pods")
            }
            assert "tiny-1" not in tried, "rank 1's attempt would take as long"
        await place.until_ready()


async def test_a_webhook_that_takes_longer_than_any_other_request_may_is_waited_for(place: World) -> None:
    operator = await place.operator()
    async with silent_webhook(place) as (where, _):
        # Longer than an ordinary request of the operator, so its own patience must not be what ends it.
        async with present(place, WEBHOOKS, webhook(place, "slow", where, seconds=11)):
            await refused(place, "failed calling webhook")
            await place.create()
            await place.until(
                lambda i: "context deadline exceeded" in injection.message(i, ConditionType.READY),
                "the time-out is told",
            )
        assert "reconcile failed" not in operator.lines()
        await place.until_ready()
