"""`/v1/chat/completions`: the next message of a chat, which may be calls of tools."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edgerazor.runtime.batching import TokenLogprob
from edgerazor.server.completions import IMPOSSIBLE
from edgerazor.server.engine import Engine, Texts
from edgerazor.server.prompts import Prompts
from edgerazor.server.protocol import ChatRequest
from edgerazor.server.token_text import TokenTexts
from edgerazor.server.tool_calls import ArgumentStream, CallDelta, CallReader, ToolCall, forced_call


def logprob_body(texts: TokenTexts, logprob: TokenLogprob, count: int) -> dict[str, Any]:
    """A token with its log-probability, as chats have it."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": texts.name(token), "bytes": list(texts.raw(token)), "logprob": max(value, IMPOSSIBLE)}

    top = [entry(token, value) for token, value in logprob.top[:count]]
    return {**entry(logprob.token, logprob.logprob), "top_logprobs": top}


class Addition(NamedTuple):
    """What is new of a message."""

    content: str
    calls: list[ToolCall]
    deltas: list[CallDelta]
    logprobs: list[dict[str, Any]]
    finish: str | None


class Message:
    """One of the `n` messages while it is written.

    Args:
        reader: finds calls of tools in the text; None where there are no tools.
        forced: the whole text is a call.
    """

    def __init__(self, reader: CallReader | None, forced: bool) -> None:
        self._reader, self._forced = reader, forced
        self._call_text = ""
        self._arguments = ArgumentStream(reader.kind, reader.names, 0) if reader is not None else None
        self._deltas: list[CallDelta] = []

    def take_deltas(self) -> list[CallDelta]:
        """What is new of calls, where they are streamed."""
        if not self._forced:
            return self._reader.take_deltas() if self._reader is not None else []
        deltas, self._deltas = self._deltas, []
        return deltas

    def add(self, text: str, finish: str | None) -> tuple[str, list[ToolCall], str | None]:
        """The text for people, the calls, and why it ended, of what is new."""
        if self._reader is None or self._arguments is None:
            return text, [], finish
        if self._forced:
            self._call_text += text
            if self._reader.stream:
                self._deltas += self._arguments.read(self._call_text)
            if finish is None:
                return "", [], None
            call = forced_call(self._call_text)
            if call is None:
                return ("" if self._arguments.given else self._call_text), [], finish
            if self._reader.stream and not self._arguments.given:
                self._deltas.append(CallDelta(0, call.arguments, call))
            return "", [call], "tool_calls"
        content, calls = self._reader.push(text)
        if finish is not None:
            rest, last = self._reader.finish()
            content, calls = content + rest, calls + last
            finish = "tool_calls" if self._reader.calls else finish
        return content, calls, finish


@dataclass
class Gathered:
    """A message that is given as a whole."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None


class Chat:
    """The answer to a request, whole or in chunks.

    Args:
        engine: that writes.
        prompts: that made the jobs.
        request: checked.
        texts: its jobs, submitted.
    """

    def __init__(self, engine: Engine, prompts: Prompts, request: ChatRequest, texts: Texts) -> None:
        self._engine, self._request, self._texts = engine, request, texts
        self._identifier, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        kind = prompts.call_kind() if request.calls_tools else None
        names = {tool.function.name for tool in request.tools}
        forced = request.tool_choice not in (None, "none", "auto")
        self._messages = [
            Message(CallReader(kind, names, request.stream) if kind is not None else None, forced)
            for _ in range(request.n)
        ]

    async def whole(self) -> dict[str, Any]:
        """All messages at once."""
        gathered = [Gathered() for _ in self._messages]
        async with contextlib.aclosing(self._additions()) as additions:
            async for index, addition in additions:
                message = gathered[index]
                message.content += addition.content
                message.calls += addition.calls
                message.logprobs += addition.logprobs
                message.finish = addition.finish or message.finish
        choices = [self._choice(index, message) for index, message in enumerate(gathered)]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._texts.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The messages as they are written."""
        usage = {"usage": None} if self._request.wants_usage else {}
        head = {**self._head("chat.completion.chunk"), **usage}
        for index in range(len(self._messages)):
            yield {**head, "choices": [self._delta(index, {"role": "assistant", "content": ""})]}
        async with contextlib.aclosing(self._additions()) as additions:
            async for index, addition in additions:
                delta: dict[str, Any] = {"content": addition.content} if addition.content else {}
                if addition.deltas:
                    delta["tool_calls"] = [call.body() for call in addition.deltas]
                if delta or addition.finish or addition.logprobs:
                    yield {**head, "choices": [self._delta(index, delta, addition)]}
        if self._request.wants_usage:
            yield {**head, "choices": [], "usage": self._texts.usage()}

    async def _additions(self) -> AsyncGenerator[tuple[int, Addition], None]:
        async with contextlib.aclosing(self._texts.pieces()) as pieces:
            async for index, piece in pieces:
                message = self._messages[index]
                content, calls, finish = message.add(piece.text, piece.finish)
                bodies = [
                    logprob_body(self._engine.token_texts, logprob, self._request.top_logprobs)
                    for logprob, _ in piece.logprobs
                ]
                yield index, Addition(content, calls, message.take_deltas(), bodies, finish)

    def _choice(self, index: int, message: Gathered) -> dict[str, Any]:
        body: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.calls:
            body["content"] = message.content or None
            body["tool_calls"] = [call.body() for call in message.calls]
        logprobs = {"content": message.logprobs, "refusal": None} if self._request.logprobs else None
        return {"index": index, "message": body, "logprobs": logprobs, "finish_reason": message.finish}

    def _delta(self, index: int, delta: dict[str, Any], addition: Addition | None = None) -> dict[str, Any]:
        logprobs = None
        if addition is not None and addition.logprobs:
            logprobs = {"content": addition.logprobs, "refusal": None}
        finish = addition.finish if addition is not None else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._identifier, "object": kind, "created": self._created, "model": self._engine.name}
