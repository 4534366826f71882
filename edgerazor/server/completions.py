"""`/v1/completions`: texts that go on from prompts, with the prompts and their log-probabilities on request."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from edgerazor.runtime.batching import TokenLogprob
from edgerazor.runtime.detokenizer import Detokenizer
from edgerazor.server.engine import Engine, Job, Texts
from edgerazor.server.protocol import CompletionRequest
from edgerazor.server.token_text import TokenTexts

#: What JSON has no number for, as OpenAI writes it.
IMPOSSIBLE = -9999.0


class Logprobs:
    """The log-probabilities of consecutive tokens, as completions have them.

    Args:
        texts: what tokens are called.
        count: of the likeliest tokens.
        by_number: tokens are called `token_id:N`, as vLLM has it, so that a program knows which they are.
    """

    def __init__(self, texts: TokenTexts, count: int, by_number: bool = False) -> None:
        self._texts, self._count, self._by_number = texts, count, by_number
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add(self, logprob: TokenLogprob, offset: int) -> None:
        """A token, and the likeliest in its place."""
        top: dict[str, float] = {}
        for token, value in logprob.top[: self._count]:
            top.setdefault(self._name(token), max(value, IMPOSSIBLE))
        name = self._name(logprob.token)
        top.setdefault(name, max(logprob.logprob, IMPOSSIBLE))
        self.tokens.append(name)
        self.token_logprobs.append(max(logprob.logprob, IMPOSSIBLE))
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def add_first(self, token: int) -> None:
        """The first token of a prompt, which follows nothing."""
        self.tokens.append(self._name(token))
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(0)

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._by_number else self._texts.name(token)

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


class Completion:
    """The answer to a request, whole or in chunks.

    Args:
        engine: that writes.
        request: checked.
        jobs: of it.
        texts: those jobs, submitted.
    """

    def __init__(self, engine: Engine, request: CompletionRequest, jobs: Sequence[Job], texts: Texts) -> None:
        self._engine, self._request, self._jobs, self._texts = engine, request, jobs, texts
        self._identifier, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._prompts: dict[int, tuple[str, list[int]]] = {}

    async def whole(self) -> dict[str, Any]:
        """All texts at once."""
        words: list[list[str]] = [[] for _ in self._jobs]
        logprobs = [self._new_logprobs() for _ in self._jobs]
        reasons: list[str | None] = [None] * len(self._jobs)
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, text, more, finish in pieces:
                words[index].append(text)
                reasons[index] = finish or reasons[index]
                if more is not None:
                    logprobs[index] = joined(logprobs[index], more)
        choices = [
            self._choice(index, "".join(words[index]), logprobs[index], reasons[index])
            for index in range(len(self._jobs))
        ]
        return {**self._head(), "choices": choices, "usage": self._texts.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The texts as they are written."""
        usage = {"usage": None} if self._request.wants_usage else {}
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, text, logprobs, finish in pieces:
                yield {**self._head(), "choices": [self._choice(index, text, logprobs, finish)], **usage}
        if self._request.wants_usage:
            yield {**self._head(), "choices": [], "usage": self._texts.usage()}

    async def _pieces(self) -> AsyncGenerator[tuple[int, str, Logprobs | None, str | None], None]:
        """Number, text, log-probabilities and end of what comes; an echoed prompt comes first."""
        begun: set[int] = set()
        async with contextlib.aclosing(self._texts.pieces()) as pieces:
            async for index, piece in pieces:
                text, logprobs = piece.text, self._new_logprobs()
                before = 0
                if self._request.echo:
                    prompt, offsets = self._prompt(index)
                    before = len(prompt)
                    if index not in begun:
                        text = prompt + text
                        self._add_prompt(index, logprobs, offsets)
                begun.add(index)
                if logprobs is not None:
                    for logprob, offset in piece.logprobs:
                        logprobs.add(logprob, before + offset)
                yield index, text, logprobs, piece.finish

    def _prompt(self, index: int) -> tuple[str, list[int]]:
        """The text of an echoed prompt, and where its tokens begin in it."""
        ids = self._jobs[index].request.prompt
        if id(ids) not in self._prompts:
            given = self._request.prompts[index // self._request.n]
            detokenizer, text, offsets = Detokenizer(self._engine.model.tokenizer), "", []
            for token in ids:
                offsets.append(len(text))
                text += detokenizer.push([token])
            text += detokenizer.finish()
            self._prompts[id(ids)] = (given if isinstance(given, str) else text), offsets
        return self._prompts[id(ids)]

    def _add_prompt(self, index: int, logprobs: Logprobs | None, offsets: list[int]) -> None:
        writing = self._texts.writings[index]
        if logprobs is None or writing.prompt_logprobs is None:
            return
        logprobs.add_first(writing.job.request.prompt[0])
        for logprob, offset in list(zip(writing.prompt_logprobs, offsets, strict=True))[1:]:
            if logprob is not None:
                logprobs.add(logprob, offset)

    def _new_logprobs(self) -> Logprobs | None:
        count = self._request.logprobs
        by_number = self._request.return_tokens_as_token_ids
        return None if count is None else Logprobs(self._engine.token_texts, count, by_number)

    def _choice(self, index: int, text: str, logprobs: Logprobs | None, finish: str | None) -> dict[str, Any]:
        body = None if logprobs is None else logprobs.body()
        return {"index": index, "text": text, "logprobs": body, "finish_reason": finish}

    def _head(self) -> dict[str, Any]:
        head = {"id": self._identifier, "object": "text_completion", "created": self._created}
        return {**head, "model": self._engine.name}


def joined(first: Logprobs | None, second: Logprobs) -> Logprobs:
    """The log-probabilities of two stretches of a text."""
    if first is None:
        return second
    first.tokens += second.tokens
    first.token_logprobs += second.token_logprobs
    first.top_logprobs += second.top_logprobs
    first.text_offset += second.text_offset
    return first
