"""Answers while they are made: server-sent events, and the client that may go away before the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response

from edgerazor.server.engine import Ended, Texts
from edgerazor.server.errors import ApiError

#: Seconds that a client may take to read what lies in the buffers of the connection.
SEND_SECONDS = 30.0
#: The status of answers that nobody is there to read; it is in the metrics alone.
GONE = 499

Send = Callable[[dict[str, Any]], Awaitable[None]]


def dumps(value: Any) -> bytes:
    """JSON in UTF-8, without numbers that are none."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(dumps(value), status, media_type="application/json")


class JsonEvents(Response):
    """A stream of server-sent events, each an object in JSON, and `[DONE]` at the end.

    Args:
        texts: that it is of; cancelled when the client goes away or reads too slowly.
        chunks: the objects.
    """

    def __init__(self, texts: Texts, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(media_type="text/event-stream")
        self._texts, self._chunks = texts, chunks
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watching = asyncio.create_task(watch(receive, self._texts))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self._chunks) as chunks:
                await self._send_all(chunks, send)
        finally:
            self._texts.close()
            watching.cancel()

    async def _send_all(self, chunks: AsyncGenerator[dict[str, Any], None], send: Send) -> None:
        try:
            async for chunk in chunks:
                await self._send(dumps(chunk), send)
            await self._send(b"[DONE]", send)
        except ApiError as error:
            await self._send(dumps(error.body()), send)
        except Ended:  # gone, or as good as
            return
        except TimeoutError:
            self._texts.end("slow")
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, data: bytes, send: Send) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


async def watch(receive: Callable[[], Awaitable[Any]], texts: Texts) -> None:
    """Wait for the client to go away, and end the texts then."""
    while (await receive())["type"] != "http.disconnect":
        pass
    texts.end("gone")


@contextlib.asynccontextmanager
async def watched(request: Request, texts: Texts) -> AsyncIterator[None]:
    """Around the making of a whole answer: its texts end when the client goes away."""
    watching = asyncio.create_task(watch(request.receive, texts))
    try:
        yield
    finally:
        texts.close()
        watching.cancel()
