"""The public API on rank 0: OpenAI's chat completions and completions, plain and as a stream."""

import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from aiohttp import web

from mlx_runner import channel

from .answers import answers, dispatched
from .control import readiness
from .http import SlowClientError, read_body, write
from .metrics import Metrics
from .openai_errors import ApiError
from .openai_models import ChatRequest, CompletionRequest, parse_chat, parse_completion
from .openai_shapes import Chat, Completion, Shape
from .requests import QueueFullError, UnavailableError
from .supervisor import Supervisor
from .tickets import NOT_READY, Paused, Ticket

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * 1024 * 1024
_EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"


class PublicApi:
    """Handlers of the public port."""

    def __init__(self, supervisor: Supervisor, metrics: Metrics) -> None:
        self._supervisor = supervisor
        self._metrics = metrics

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._errors])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{id:.+}", self.model),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.metrics),
            ]
        )
        return app

    # -- generation
    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        asked = parse_chat(await self._body(request))
        return await self._generate(request, asked, Chat(asked.model))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        asked = parse_completion(await self._body(request))
        return await self._generate(request, asked, Completion(asked.model))

    async def _body(self, request: web.Request) -> Any:
        """The JSON; not even read where the request would not be taken in."""
        with _admission():
            self._supervisor.broker.admit()
        return await _json(request)

    async def _generate(
        self, request: web.Request, asked: ChatRequest | CompletionRequest, shape: Shape
    ) -> web.StreamResponse:
        broker = self._supervisor.broker
        usage = asked.include_usage()
        command = asked.generate(shape.id)
        self._check_model(asked.model)
        with _admission():
            ticket = broker.enter(command, asked.model)
        try:
            await dispatched(broker, ticket)
            if asked.stream:
                return await self._stream(request, ticket, shape, usage)
            return await self._whole(ticket, shape)
        finally:
            # Also when the client left: the handler is cancelled then.
            broker.leave(ticket)

    async def _whole(self, ticket: Ticket, shape: Shape) -> web.Response:
        text: list[str] = []
        async for answer in answers(ticket):
            match answer:
                case channel.Delta():
                    text.append(answer.text)
                case channel.Finished():
                    return web.json_response(shape.whole("".join(text), answer))
        raise ApiError(500, "the engine ended the answer without a word", code="internal_error")

    async def _stream(self, request: web.Request, ticket: Ticket, shape: Shape, usage: bool) -> web.StreamResponse:
        told = answers(ticket)
        # What is refused is refused with a status, before any stream begins: also what no engine has begun with.
        first = await anext(answer async for answer in told if ticket.begun or not isinstance(answer, Paused))
        response = web.StreamResponse(headers=_EVENT_STREAM)
        await response.prepare(request)
        try:
            try:
                await _tell(response, first, told, shape, usage)
            except ApiError as error:
                # The status line is gone: an error event is the honest end, and no [DONE] after it.
                await _send(response, error.body())
        except (SlowClientError, ConnectionError) as error:
            log.info("a client left its stream: %s", error or type(error).__name__)
        return response

    # -- the rest
    async def models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`: the one that is served."""
        name = self._supervisor.served_name
        return web.json_response({"object": "list", "data": [_model(name)] if name else []})

    async def model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{id}`."""
        self._check_model(request.match_info["id"])
        return web.json_response(_model(request.match_info["id"]))

    async def healthz(self, request: web.Request) -> web.Response:
        """The supervisor lives."""
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        """New requests are answered, or held while a restart is due."""
        why = readiness(self._supervisor)
        if why:
            raise ApiError(503, why, code=NOT_READY)
        return web.Response(text="ok\n")

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    def _check_model(self, name: str) -> None:
        served = self._supervisor.served_name
        if name != served:
            raise ApiError(
                404,
                f"The model {name!r} does not exist: this endpoint serves {served!r}",
                code="model_not_found",
                param="model",
            )

    @web.middleware
    async def _errors(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Every error in OpenAI's shape, and every answer counted."""
        endpoint = request.match_info.route.resource.canonical if request.match_info.route.resource else "other"
        response: web.StreamResponse
        try:
            response = await handler(request)
        except ApiError as error:
            response = error.response()
        except SlowClientError as error:
            response = ApiError(408, str(error), code="timeout").response()
        except web.HTTPException as error:
            response = _http_error(request, error).response()
        self._metrics.http_requests.labels(endpoint, str(response.status)).inc()
        if self._supervisor.machine.report.draining and not response.prepared:
            response.force_close()  # the client's next request should find another pod
        return response


async def _tell(
    response: web.StreamResponse,
    first: channel.Delta | channel.Finished | Paused,
    told: AsyncIterator[channel.Delta | channel.Finished | Paused],
    shape: Shape,
    usage: bool,
) -> None:
    """An answer as a stream of chunks, `[DONE]` last; a comment, which clients skip, while the group restarts."""
    for chunk in shape.opening(usage):
        await _send(response, chunk)
    answer: channel.Delta | channel.Finished | Paused | None = first
    while answer is not None:
        match answer:
            case channel.Delta():
                if answer.text:
                    await _send(response, shape.chunk(answer.text, usage))
            case Paused():
                await write(response, f": the group restarts, {answer.tokens} tokens given so far\n\n".encode())
            case channel.Finished():
                for chunk in shape.closing(answer, usage):
                    await _send(response, chunk)
                await write(response, _DONE)
        answer = await anext(told, None)


@contextlib.contextmanager
def _admission() -> Iterator[None]:
    try:
        yield
    except UnavailableError as error:
        raise ApiError(503, str(error), code=NOT_READY) from error
    except QueueFullError as error:
        raise ApiError(429, str(error), code="queue_full") from error


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await read_body(request))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await write(response, b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")


def _http_error(request: web.Request, error: web.HTTPException) -> ApiError:
    match error.status:
        case 404:
            return ApiError(404, f"Unknown request URL: {request.method} {request.path}", code="unknown_url")
        case 405:
            return ApiError(405, f"{request.method} is not allowed for {request.path}", code="method_not_allowed")
        case 413:
            return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
        case _:
            return ApiError(error.status, error.reason, code="http_error")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "mlx-operator"}


_STARTED = int(time.time())
