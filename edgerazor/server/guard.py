"""Who is let in: the host that a request names, the page that it comes from, the key, and a server that is ending.

On loopback there is no key by default, so what else runs on the machine may ask. Web pages may not: a page of another
origin could otherwise have the browser of its reader send requests here. It is kept out by the `Origin` that browsers
send, and where it has its own name lead to this machine (DNS rebinding), by the `Host` that names it.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from edgerazor.console import Console
from edgerazor.server.engine import Engine
from edgerazor.server.errors import ApiError, busy
from edgerazor.server.events import GONE, dumps

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

#: What is answered without a key, and while the server is ending.
OPEN, WHILE_ENDING = {"/", "/health"}, {"/", "/health", "/metrics"}
#: Request ids of clients that are taken over.
IDENTIFIER = re.compile(rb"[A-Za-z0-9_.-]{1,128}")
#: Paths by which requests are counted; others are one.
PATHS = (
    "/",
    "/health",
    "/metrics",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
)


def is_loopback(host: str) -> bool:
    """Whether an address or name is that of this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


class Guard:
    """Around the application: lets requests in or answers them itself, and gives each an id.

    Args:
        app: ASGI.
        engine: of the application.
        key: that clients have to give; None for none.
        loopback: the server listens there alone, so that the host of requests is known.
        console: where errors of the server go.
    """

    def __init__(self, app: Any, engine: Engine, key: str | None, loopback: bool, console: Console) -> None:
        self._app, self._engine, self._console = app, engine, console
        self._key = None if key is None else key.encode()
        self._loopback, self._origins = loopback, set(engine.settings.cors_origins)
        self._hosts = {urlsplit(origin).hostname for origin in self._origins}  # behind a proxy of this machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        identifier = given if IDENTIFIER.fullmatch(given) else uuid.uuid4().hex.encode()
        began, status = time.perf_counter(), 0

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identifier)]}
            await send(message)

        try:
            self._admit(scope, headers)
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            await refuse(error, send_with_id)
        except Exception as error:  # a bug of ours: a line for whoever runs the server, none for the client
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}:{place.lineno}"
            self._console.warn(f"Request {identifier.decode()}: {type(error).__name__}: {error} ({where})")
            if not status:
                await refuse(ApiError(500, "The server failed; its log says more."), send_with_id)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._engine.metrics.requests.labels(path, str(status or GONE)).inc()
            self._engine.metrics.seconds.observe(time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuse what may not come in.

        Raises:
            ApiError: with the status.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        name = name_of(host)
        if self._loopback and not is_loopback(name) and name not in self._hosts:
            raise ApiError(403, "The server answers to the names of this machine alone, not to another host.")
        origin = headers.get(b"origin")
        if origin is not None and not self._own_page(origin.decode("latin-1"), host):
            raise ApiError(403, "Pages of other origins may not use the server; see --cors-origins.")
        if self._engine.draining and scope["path"] not in WHILE_ENDING:
            raise busy(503, "The server is shutting down.", 5, "shutting_down")
        if self._key is not None and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            word, _, key = headers.get(b"authorization", b"").partition(b" ")
            if word.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise ApiError(
                    401, "The API key is missing or wrong.", None, "invalid_api_key", {"WWW-Authenticate": "Bearer"}
                )

    def _own_page(self, origin: str, host: str) -> bool:
        """Whether a request comes from the server's own page, or one that is allowed."""
        return origin in self._origins or "*" in self._origins or origin in (f"http://{host}", f"https://{host}")


def name_of(host: str) -> str:
    """The name or address in a `Host`, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = dumps(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
