"""The OpenAPI document of the public port, from the models that validate what clients send."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema

from .openai_chat import ChatRequest
from .openai_models import CompletionRequest
from .openai_parse import Body
from .openai_responses import ResponsesRequest
from .openai_tokens import DetokenizeRequest, TokenizeRequest

_REFERENCES = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path."""

    path: str
    summary: str
    body: type[Body] | None = None
    """Of a POST; None: a GET."""
    stream: bool = False
    """With `stream` it answers by server-sent events."""
    protected: bool = True
    """An API key is asked for, where the instance has any."""

    @property
    def method(self) -> str:
        """Of HTTP."""
        return "get" if self.body is None else "post"


ENDPOINTS = (
    Endpoint("/v1/chat/completions", "Answer a conversation", ChatRequest, stream=True),
    Endpoint("/v1/completions", "Go on with a text", CompletionRequest, stream=True),
    Endpoint("/v1/responses", "Answer a text or a conversation; nothing is stored", ResponsesRequest, stream=True),
    Endpoint("/v1/models", "The model that is served"),
    Endpoint("/v1/models/{id}", "One model"),
    Endpoint("/tokenize", "Tokens of a prompt or a conversation", TokenizeRequest),
    Endpoint("/detokenize", "Text of tokens", DetokenizeRequest),
    Endpoint("/healthz", "The supervisor lives", protected=False),
    Endpoint("/readyz", "Requests are answered, or held while the group restarts", protected=False),
    Endpoint("/metrics", "Prometheus metrics", protected=False),
    Endpoint("/openapi.json", "This document", protected=False),
)


@functools.cache
def document() -> dict[str, Any]:
    """The whole document."""
    bodies = [endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None]
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCES)
    for body in bodies:
        _add_unsupported(schemas["$defs"][body.__name__], body)
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-operator: the public API of a ModelInstance",
            "version": "v1",
            "description": "Errors have OpenAI's shape. A field that is not here is refused with its name.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _add_unsupported(schema: dict[str, Any], body: type[Body]) -> None:
    """Fields that may be sent, but ask for nothing."""
    for name, values in body.NEUTRAL.items():
        text = "Not supported: only accepted with a value that asks for nothing."
        schema["properties"][name] = {"enum": [*values, None], "description": text}
    for name in sorted(body.HARMLESS):
        schema["properties"][name] = {"description": "Accepted; changes no answer."}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": _answers(endpoint)}
    if endpoint.body is not None:
        schema = {"$ref": _REFERENCES.format(model=endpoint.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{id}" in endpoint.path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.protected:
        operation["security"] = [{"key": []}, {}]
    return operation


def _answers(endpoint: Endpoint) -> dict[str, Any]:
    kinds = ["application/json"] if endpoint.protected or endpoint.path == "/openapi.json" else ["text/plain"]
    kinds += ["text/event-stream"] if endpoint.stream else []
    error = {"content": {"application/json": {"schema": {"$ref": _REFERENCES.format(model="Error")}}}}
    answers: dict[str, Any] = {"200": {"description": "The answer", "content": {kind: {} for kind in kinds}}}
    told = {"default": "An error"}
    if endpoint.body is not None:
        told |= {"400": "A field is wrong or not supported", "429": "The queue is full", "503": "Not ready"}
    if endpoint.protected:
        told["401"] = "No valid API key"
    return answers | {status: {"description": text, **error} for status, text in told.items()}


_NULLABLE: Mapping[str, Any] = {"type": ["string", "null"]}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}
