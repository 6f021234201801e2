"""The public API on rank 0: OpenAI's endpoints that generate text, plain and as a stream, and what belongs to them."""

import logging
import time
import uuid
from typing import Any

from aiohttp import web

from mlx_runner import channel

from . import json_values, openapi
from .api_keys import ApiKeys
from .control import readiness
from .generation import admission, generate
from .http import BodyError, SlowClientError, read_body
from .metrics import Metrics
from .openai_chat import ChatRequest, parse_chat
from .openai_errors import ApiError
from .openai_models import CompletionRequest, parse_completion
from .openai_responses import ResponsesRequest, parse_responses
from .openai_shapes import Chat, Completion, Shape
from .openai_tokens import parse_detokenize, parse_tokenize, tokenized
from .questions import Question, QuestionLostError
from .response_shapes import Response
from .supervisor import Supervisor
from .tickets import NOT_READY

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * 1024 * 1024
CLIENT_LEFT = 499
"""As nginx counts it: nobody reads this answer."""
_PROTECTED = ("/v1/", "/tokenize", "/detokenize")
"""Paths that an API key is for. Probes, metrics and the description of the API stay open."""


class PublicApi:
    """Handlers of the public port."""

    def __init__(self, supervisor: Supervisor, metrics: Metrics) -> None:
        self._supervisor = supervisor
        self._metrics = metrics
        self._keys = ApiKeys(supervisor.config.api_key_file)

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._errors])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.post("/v1/responses", self.responses),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/openapi.json", self.openapi),
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
        return await self._generate(request, asked, Chat(asked.form()))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        asked = parse_completion(await self._body(request))
        return await self._generate(request, asked, Completion(asked.form()))

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/responses`."""
        asked = parse_responses(await self._body(request))
        return await self._generate(request, asked, Response(asked))

    async def tokenize(self, request: web.Request) -> web.Response:
        """`POST /tokenize`."""
        asked = parse_tokenize(await self._body(request))
        answer = await self._ask(asked.model, asked.question(f"tokenize-{uuid.uuid4().hex}"))
        return web.json_response(tokenized(answer) if isinstance(answer, channel.Tokenized) else {})

    async def detokenize(self, request: web.Request) -> web.Response:
        """`POST /detokenize`."""
        asked = parse_detokenize(await self._body(request))
        answer = await self._ask(asked.model, asked.question(f"detokenize-{uuid.uuid4().hex}"))
        return web.json_response({"prompt": answer.prompt} if isinstance(answer, channel.Detokenized) else {})

    async def _ask(self, model: str | None, question: Question) -> channel.Tokenized | channel.Detokenized:
        if model is not None:
            self._check_model(model)
        try:
            answer = await self._supervisor.broker.questions.ask(question)
        except QuestionLostError as error:
            raise ApiError(503, str(error), code=NOT_READY) from error
        if isinstance(answer, channel.Refused):
            raise ApiError(answer.status, answer.message, code=answer.code, param=answer.param)
        return answer

    async def _body(self, request: web.Request) -> Any:
        """The JSON; not even read where the request would not be taken in."""
        with admission():
            self._supervisor.broker.admit()
        return await _json(request)

    async def _generate(
        self, request: web.Request, asked: ChatRequest | CompletionRequest | ResponsesRequest, shape: Shape
    ) -> web.StreamResponse:
        commands = asked.rows(shape.id)
        self._check_model(asked.model)
        broker = self._supervisor.broker
        return await generate(request, broker, commands, asked.model, shape, stream=bool(asked.stream))

    # -- the rest
    async def models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`: the one that is served."""
        name = self._supervisor.served_name
        return web.json_response({"object": "list", "data": [_model(name)] if name else []})

    async def model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{id}`."""
        self._check_model(request.match_info["id"])
        return web.json_response(_model(request.match_info["id"]))

    async def openapi(self, request: web.Request) -> web.Response:
        """`GET /openapi.json`: the endpoints and their bodies, from the models that validate them."""
        return web.json_response(openapi.document())

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
            if request.path.startswith(_PROTECTED):
                self._keys.check(request.headers.get("Authorization"))
            response = await handler(request)
        except ApiError as error:
            response = error.response()
        except SlowClientError as error:
            response = ApiError(408, str(error), code="timeout").response()
        except BodyError as error:
            response = ApiError(400, str(error), code="invalid_body").response()
        except web.HTTPException as error:
            response = _http_error(request, error).response()
        except ConnectionError as error:
            log.info("a client left before its answer: %s", error or type(error).__name__)
            response = ApiError(CLIENT_LEFT, "the client has left", code="client_closed_request").response()
        except Exception:  # the last resort: whatever it is, the client is told and the log says where
            log.exception("a bug: %s %s", request.method, request.path)
            if request.writer.output_size:
                raise  # an answer has begun: there cannot be another one
            message = "the runner failed at this request: its log says where"
            response = ApiError(500, message, code=channel.INTERNAL_ERROR).response()
        self._metrics.http_requests.labels(endpoint, str(response.status)).inc()
        if self._supervisor.machine.report.draining and not response.prepared:
            response.force_close()  # the client's next request should find another pod
        return response


async def _json(request: web.Request) -> Any:
    text = await read_body(request)
    try:
        return json_values.read(text)
    except json_values.TooDeepError as error:
        raise ApiError(400, f"the body is {error}", code="invalid_json") from error
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error


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
