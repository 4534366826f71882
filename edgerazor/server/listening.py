"""The process around the application: its socket, its signals, and how it ends.

At the first SIGTERM or Ctrl-C, running requests have some time to finish; new ones are refused with status 503, and
the socket stays open so that they can be. At the second, the process ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.server.engine import Engine
from edgerazor.server.guard import is_loopback

__all__ = ["is_loopback", "listen", "run"]

#: Milliseconds that sent bytes may stay unread before the system gives a connection up.
UNREAD_MILLISECONDS = 60_000
#: Connections that wait to be accepted; seconds that one without a request stays.
BACKLOG, IDLE_SECONDS = 512, 30
#: Seconds that answers have, behind the last token, to be sent.
SENDING_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: an address, or a name.
        port: 0 for any free one.

    Raises:
        UserError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise usage_error(f"There is no address {host!r} to listen on: {error.strerror}.") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by the connections
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
    try:
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = (error.strerror or "it is not possible").lower()
        raise UserError(
            f"The server cannot listen on {host}, port {port}: {reason}.", "Give another --port, or 0 for any free one."
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """The address of a socket that listens, as a client writes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, with our signals instead of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(app: Any) -> Server:
    """The server of an application, not yet started."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # tracebacks of what was cancelled; Guard tells more
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a line for each write to a client that has gone
    return Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            loop="asyncio",
            http="h11",
            ws="none",
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=SENDING_SECONDS,
        )
    )


def run(app: Any, engine: Engine, listening: socket.socket, console: Console) -> None:
    """Answer requests until a signal ends it.

    Args:
        app: ASGI.
        engine: of the application.
        listening: the socket.
        console: what is told to whoever runs it.
    """
    try:
        asyncio.run(_serve(server_of(app), engine, listening, console))
    finally:
        engine.close()


async def _serve(server: Server, engine: Engine, listening: socket.socket, console: Console) -> None:
    loop = asyncio.get_running_loop()
    engine.attach(loop)
    endings: list[asyncio.Task[None]] = []

    def on_signal(number: int) -> None:
        if endings:
            os._exit(128 + number)
        console.say(f"Ending: running requests have {engine.settings.drain_seconds:g} seconds; again to end at once.")
        endings.append(loop.create_task(_end(server, engine)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await server.serve(sockets=[listening])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # the process is about to end, and with code 0


async def _end(server: Server, engine: Engine) -> None:
    """Let running requests finish, then stop the server."""
    engine.draining = True
    if not await asyncio.to_thread(engine.scheduler.drain, engine.settings.drain_seconds):
        await asyncio.to_thread(engine.close)
    server.should_exit = True
