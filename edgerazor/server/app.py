"""The application: what is answered under which path."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel

from edgerazor.console import Console
from edgerazor.server import metrics, page, protocol
from edgerazor.server.chat import Chat
from edgerazor.server.completions import Completion
from edgerazor.server.engine import Ended, Engine, Texts
from edgerazor.server.errors import ApiError
from edgerazor.server.events import GONE, JsonEvents, json_response, watched
from edgerazor.server.guard import Guard
from edgerazor.server.prompts import Prompts
from edgerazor.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

#: Seconds that a body may take to arrive, and how much of a refused one is read, so that its sender reads the answer.
BODY_SECONDS, REFUSED_FACTOR = 60.0, 8

Body = TypeVar("Body", bound=BaseModel)


def build_app(engine: Engine, key: str | None, loopback: bool, console: Console) -> Any:
    """The ASGI application for an engine.

    Args:
        engine: that writes.
        key: that clients have to give; None for none.
        loopback: the server listens there alone.
        console: where errors of the server go.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    routes = Routes(engine)
    app.add_api_route("/", routes.page, methods=["GET"], response_model=None)
    app.add_api_route("/health", routes.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    app.add_api_route("/tokenize", routes.tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/detokenize", routes.detokenize, methods=["POST"], response_model=None)
    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(Ended, on_gone)
    app.add_exception_handler(404, on_unknown)
    app.add_exception_handler(405, on_unknown)
    guarded: Any = Guard(app, engine, key, loopback, console)
    if engine.settings.cors_origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=engine.settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


async def on_error(request: Request, error: Exception) -> Response:
    """The answer to what is refused."""
    assert isinstance(error, ApiError)
    response = json_response(error.body(), error.status)
    response.headers.update(error.headers)
    return response


async def on_gone(request: Request, error: Exception) -> Response:
    """The end of a request whose client has gone."""
    return Response(status_code=GONE)


async def on_unknown(request: Request, error: Exception) -> Response:
    """The answer where there is nothing, or not by this method."""
    if getattr(error, "status_code", 404) == 405:
        return await on_error(request, ApiError(405, f"{request.url.path} has no method {request.method}."))
    return await on_error(request, ApiError(404, f"There is nothing under {request.url.path}."))


async def read_body(request: Request, kind: type[Body], most: int) -> Body:
    """The checked body of a request.

    Raises:
        ApiError: it is too large, no JSON, or has a wrong field.
    """
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content != "application/json":
        raise ApiError(415, "The body has to be JSON: send it with `Content-Type: application/json`.")
    length = request.headers.get("content-length", "0")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    body += part
                if size > REFUSED_FACTOR * most or (length.isdecimal() and int(length[:20]) > REFUSED_FACTOR * most):
                    break
    except TimeoutError:
        raise ApiError(408, "The body of the request did not arrive in time.") from None
    if size > most or len(body) < size:
        raise ApiError(413, f"The body of a request has at most {most:,} bytes.", code="request_too_large")
    if len(body) > 100_000:  # parsing it would hold up the others
        return await asyncio.to_thread(protocol.parse, kind, bytes(body))
    return protocol.parse(kind, bytes(body))


class Routes:
    """The functions behind the paths.

    Args:
        engine: that writes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._prompts = engine, Prompts(engine)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        body = await read_body(request, kind, self._engine.settings.max_body_bytes)
        name = getattr(body, "model", None)
        if name not in (None, self._engine.name):
            raise ApiError(
                404, f"There is no model {name!r:.200}, but {self._engine.name!r}.", "model", "model_not_found"
            )
        return body

    async def page(self) -> Response:
        """The chat page."""
        return Response(page.content(), media_type="text/html; charset=utf-8", headers=page.headers())

    async def health(self) -> Response:
        """Whether requests are answered."""
        if self._engine.draining:
            return json_response({"status": "draining"}, 503)
        return json_response({"status": "ok"})

    async def metrics(self) -> Response:
        """Numbers for Prometheus."""
        return Response(self._engine.metrics.page(), headers={"content-type": metrics.CONTENT_TYPE})

    async def models(self) -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [self._model_body()]})

    async def model(self, name: str) -> Response:
        """The model of a name."""
        if name != self._engine.name:
            raise ApiError(
                404, f"There is no model {name!r:.200}, but {self._engine.name!r}.", "model", "model_not_found"
            )
        return json_response(self._model_body())

    def _model_body(self) -> dict[str, Any]:
        engine = self._engine
        head = {"id": engine.name, "object": "model", "created": engine.created, "owned_by": "edgerazor"}
        return {**head, "max_model_len": engine.context, "chat": bool(engine.model.tokenizer.chat_template)}

    async def completions(self, request: Request) -> Response:
        """Texts that go on from prompts."""
        body = await self._body(request, CompletionRequest)
        jobs = await self._engine.read(lambda: self._prompts.of_completion(body))
        texts = Texts(self._engine, jobs)
        completion = Completion(self._engine, body, jobs, texts)
        if body.stream:
            return JsonEvents(texts, completion.chunks())
        async with watched(request, texts):
            return json_response(await completion.whole())

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        body = await self._body(request, ChatRequest)
        jobs = await self._engine.read(lambda: self._prompts.of_chat(body))
        texts = Texts(self._engine, jobs)
        answer = Chat(self._engine, self._prompts, body, texts)
        if body.stream:
            return JsonEvents(texts, answer.chunks())
        async with watched(request, texts):
            return json_response(await answer.whole())

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text or a chat."""
        body = await self._body(request, TokenizeRequest)
        ids = await self._engine.read(lambda: self._prompts.tokens(body))
        result: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": self._engine.context}
        if body.return_token_strs:
            result["token_strs"] = [self._engine.token_texts.name(token) for token in ids]
        return json_response(result)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens, special ones too."""
        body = await self._body(request, DetokenizeRequest)
        tokenizer = self._engine.model.tokenizer
        if any(token >= self._engine.model.vocabulary for token in body.tokens):
            raise ApiError(400, f"The model knows {self._engine.model.vocabulary:,} tokens.", "tokens")
        text = await self._engine.read(lambda: tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False))
        return json_response({"prompt": text})
