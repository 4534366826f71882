"""A server in a thread of the test's process, and schedulers that write what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edgerazor.console import Console
from edgerazor.recipe import Serve
from edgerazor.runtime import Model
from edgerazor.runtime.batching import QueueFullError, SequenceEvent, SequenceRequest
from edgerazor.server import Engine, build_app, listen
from edgerazor.server.listening import server_of, url_of
from helpers.packed_folders import all_of, write_packed
from helpers.tiny_job import with_template
from helpers.tiny_models import VOCABULARY, ModelMaker, tiny_tokenizer

#: Writes roles, tools and words; the marks of calls say which kind of template it is.
TEMPLATE = """{%- if tools %}{{ 'tools:' + (tools | tojson) + ' as <tool_call></s>' }}{% endif %}
{%- for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
POSITIONS = 4096
KEY = "a key for tests"


def write_served_model(make_model: ModelMaker, folder: Path) -> Path:
    """A packed model with a chat template, which writes words and hardly ever ends its text."""
    model = make_model(folder / "plain", "llama", max_position_embeddings=POSITIONS)
    pieces = tiny_tokenizer().convert_ids_to_tokens(list(range(VOCABULARY)))
    words = torch.tensor([piece.removeprefix("Ġ").isascii() and piece[-1:].isalpha() for piece in pieces])
    with torch.no_grad():
        model.get_output_embeddings().weight[~words] *= 0.3
    model.save_pretrained(folder / "plain")
    with_template(folder / "plain", folder / "model", TEMPLATE)
    write_packed(folder / "packed", folder / "model", all_of("int4"))
    return folder / "packed"


class ScriptedHandle:
    """Of a text that a script writes."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedScheduler:
    """Writes the same text for all, a token every few milliseconds, in a thread for each.

    Args:
        tokens: of the text.
        seconds: between two tokens.
        room: texts at a time; more are refused.
    """

    def __init__(self, tokens: list[int], seconds: float = 0.0, room: int = 1000) -> None:
        self.tokens, self.seconds, self.room = tokens, seconds, room
        self.handles: list[ScriptedHandle] = []
        self.threads: list[threading.Thread] = []

    def submit(self, request: SequenceRequest, on_event: Callable[[SequenceEvent], None]) -> ScriptedHandle:
        if sum(thread.is_alive() for thread in self.threads) >= self.room:
            raise QueueFullError(self.room, 2.5)
        handle = ScriptedHandle()

        def write() -> None:
            for token in self.tokens[: request.max_tokens]:
                if handle.cancelled.wait(self.seconds):
                    on_event(SequenceEvent(None, finish_reason="cancelled"))
                    return
                on_event(SequenceEvent(token))
            on_event(SequenceEvent(None, finish_reason="eos" if request.max_tokens > len(self.tokens) else "length"))

        self.handles.append(handle)
        self.threads.append(threading.Thread(target=write, daemon=True))
        self.threads[-1].start()
        return handle

    def statistics(self) -> dict[str, float]:
        return {"running": float(sum(thread.is_alive() for thread in self.threads))}

    def drain(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        for handle in self.handles:
            handle.cancel()


class Served:
    """A server, and plain requests to it."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine = url, engine
        self.address = url.removeprefix("http://")

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, sent, {**given, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer to a body."""
        status, _, answer = self.request("POST", path, body, headers)
        return status, json.loads(answer)

    def statistic(self, name: str) -> float:
        return self.engine.scheduler.statistics()[name]

    def wait_until(self, holds: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not become true in time"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    model: Model,
    key: str | None = None,
    scheduler: Any = None,
    loopback: bool = True,
    send_buffer: int | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """A server of a model, in a thread; `send_buffer` is the bytes that the system holds for a client."""
    engine = Engine(model, Serve(**settings), "tiny", scheduler)
    server = server_of(build_app(engine, key, loopback, Console(quiet=True)))
    listening = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = url_of(listening)

    async def serve() -> None:
        engine.attach(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        yield Served(url, engine)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close()
        listening.close()
