"""Between the event loop and the scheduler's thread: texts are submitted, and their events become pieces of text.

The scheduler calls from its own thread, so what it says goes through `call_soon_threadsafe` into the channel of a
request. A channel ends early when the client goes away, reads too slowly, or the time of the request is over; its texts
are then cancelled, whatever state they are in.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from edgerazor.errors import UserError
from edgerazor.recipe import Serve
from edgerazor.runtime import Model, generation
from edgerazor.runtime.batching import (
    BatchScheduler,
    BatchSettings,
    QueueFullError,
    SchedulerClosedError,
    SequenceEvent,
    SequenceRequest,
    TokenLogprob,
)
from edgerazor.runtime.detokenizer import TextAssembler
from edgerazor.runtime.sequential import SequentialScheduler
from edgerazor.server.errors import ApiError, busy, from_user_error
from edgerazor.server.metrics import Metrics
from edgerazor.server.token_text import TokenTexts

#: Events of a request that may wait for a client that reads slowly, before the request is given up.
MOST_WAITING = 4096

Finish = Literal["stop", "length"]
Ending = Literal["gone", "slow", "time"]
Value = TypeVar("Value")


class Handle(Protocol):
    """Of a text that a scheduler has."""

    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """What writes: `runtime.batching.BatchScheduler`, or `SequentialScheduler`."""

    def submit(self, request: SequenceRequest, on_event: Callable[[SequenceEvent], None]) -> Handle: ...
    def statistics(self) -> dict[str, float]: ...
    def drain(self, timeout: float) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """A text to be written.

    Args:
        request: for the scheduler.
        stops: strings before the first of which it ends.
        goes_on: the text goes on from the prompt, instead of being one of its own.
        shown: special tokens that are a part of the text.
        empty: nothing is to be written; what the scheduler writes all the same is left out.
    """

    request: SequenceRequest
    stops: tuple[str, ...] = ()
    goes_on: bool = False
    shown: frozenset[int] = frozenset()
    empty: bool = False


class Piece(NamedTuple):
    """What came of a text: characters, the log-probabilities of its tokens with their places, and how it ended."""

    text: str
    logprobs: list[tuple[TokenLogprob, int]]
    finish: Finish | None


class Ended(Exception):  # noqa: N818 - no error
    """The channel of a request ended before its texts did."""

    def __init__(self, reason: Ending) -> None:
        super().__init__(reason)
        self.reason = reason


class Channel:
    """Events on their way to a request, a bounded number of them. All of it in the event loop's thread."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, SequenceEvent, float]] = deque()
        self._changed = asyncio.Event()
        self._ended: Ending | None = None

    def put(self, index: int, event: SequenceEvent, moment: float) -> None:
        if self._ended is None:
            self._events.append((index, event, moment))
            if len(self._events) > MOST_WAITING:
                self.end("slow")
            self._changed.set()

    def end(self, reason: Ending) -> None:
        """No more events are wanted."""
        self._ended = self._ended or reason
        self._events.clear()
        self._changed.set()

    async def get(self) -> tuple[int, SequenceEvent, float]:
        """The next event: number of the text, event, and when it happened.

        Raises:
            Ended: there will be none.
        """
        while not self._events:
            if self._ended is not None:
                raise Ended(self._ended)
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()


@dataclass
class Writing:
    """A text while it is written."""

    job: Job
    assembler: TextAssembler
    tokens: int = 0
    cached: int = 0
    finish: Finish | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    pending: list[tuple[TokenLogprob, int]] = field(default_factory=list)

    def take(self, event: SequenceEvent) -> Piece:
        """What an event brings.

        Raises:
            ApiError: the scheduler failed, or is ending.
        """
        if event.finish_reason == "error":
            raise ApiError(500, event.error or "The model could not go on.")
        if event.finish_reason == "cancelled":
            raise busy(503, "The server is shutting down.", 5, "shutting_down")
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.cached = max(self.cached, event.cached_tokens)
        text = ""
        if self.job.empty:
            self.finish = "length"
        else:
            if event.token is not None:
                self.tokens += 1
                if event.logprob is not None:
                    self.pending.append((event.logprob, self.assembler.decoded))
                text = self.assembler.push([event.token])
            if event.finish_reason is not None and not self.assembler.matched:
                text += self.assembler.finish()
                self.finish = "stop" if event.finish_reason == "eos" else "length"
            if self.assembler.matched:
                self.finish = "stop"
        return self._piece(text)

    def cut(self) -> Piece:
        """End it as it is: its time is over."""
        self.finish = "length"
        return self._piece(self.assembler.finish())

    def _piece(self, text: str) -> Piece:
        """With the text go its tokens; behind the last, those that have none."""
        whole = self.finish is not None and not self.assembler.matched
        ready = [pair for pair in self.pending if whole or pair[1] < self.assembler.released]
        self.pending = self.pending[len(ready) :]
        return Piece(text, ready, self.finish)


class Texts:
    """The texts of one request, submitted: pieces as they come, and what they took.

    Args:
        engine: that writes.
        jobs: at least one.

    Raises:
        ApiError: the queue is full, or the server is ending, or a prompt does not fit; nothing is then submitted.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job]) -> None:
        self._engine, self._channel = engine, Channel()
        self._began, self._latest = time.perf_counter(), [0.0] * len(jobs)
        tokenizer = engine.model.tokenizer
        self.writings = [
            Writing(job, TextAssembler(tokenizer, job.request.prompt if job.goes_on else (), job.stops, job.shown))
            for job in jobs
        ]
        self._handles: list[Handle] = []
        try:
            for index, job in enumerate(jobs):
                self._handles.append(engine.submit(job.request, functools.partial(self._from_thread, index)))
        except ApiError:
            self.close()
            raise
        self._timer = engine.loop.call_later(engine.settings.request_seconds, self.end, "time")

    def end(self, reason: Ending) -> None:
        """Give no more pieces: the client has gone, or reads too slowly, or the time is over."""
        self._channel.end(reason)

    def close(self) -> None:
        """Cancel what is still being written."""
        for handle in self._handles:
            handle.cancel()
        if hasattr(self, "_timer"):
            self._timer.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Number of a text and what came of it, until all have ended.

        Raises:
            ApiError: the scheduler failed; or nothing was written when the time was over.
            Ended: the client has gone, or read too slowly.
        """
        try:
            while any(writing.finish is None for writing in self.writings):
                index, event, moment = await self._channel.get()
                writing = self.writings[index]
                if writing.finish is not None:  # what was on its way when it was cancelled
                    continue
                self._measure(index, event, moment)
                piece = writing.take(event)
                if piece.finish is not None and event.finish_reason is None:
                    self._handles[index].cancel()
                if piece.text or piece.logprobs or piece.finish:
                    yield index, piece
        except Ended as ended:
            self._engine.metrics.ended.labels(ended.reason).inc()
            if ended.reason != "time":
                raise
            if not any(writing.tokens for writing in self.writings):
                raise busy(503, "The request waited for all of its time.", 30, "timeout") from None
            for index, writing in enumerate(self.writings):
                if writing.finish is None:
                    yield index, writing.cut()
        finally:
            self.close()
            self._engine.metrics.count(self.usage())

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts, each once, and of texts."""
        prompts = {id(writing.job.request.prompt): writing for writing in self.writings}
        prompt = sum(len(writing.job.request.prompt) for writing in prompts.values())
        completion = sum(writing.tokens for writing in self.writings)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(writing.cached for writing in prompts.values())},
        }

    def _from_thread(self, index: int, event: SequenceEvent) -> None:
        """Called by the scheduler."""
        try:
            self._engine.loop.call_soon_threadsafe(self._channel.put, index, event, time.perf_counter())
        except RuntimeError:  # the loop has ended
            return

    def _measure(self, index: int, event: SequenceEvent, moment: float) -> None:
        if event.token is not None:
            if self._latest[index]:
                self._engine.metrics.between_tokens.observe(moment - self._latest[index])
            else:
                self._engine.metrics.first_token.observe(moment - self._began)
            self._latest[index] = moment


class Engine:
    """A model that writes for many clients.

    Args:
        model: packed, of any engine.
        settings: limits of requests, and of the scheduler.
        name: of the model in the interface.
        scheduler: None for that of the model's engine.
    """

    def __init__(self, model: Model, settings: Serve, name: str, scheduler: Scheduler | None = None) -> None:
        self.model, self.settings, self.name = model, settings, name
        self.context = min(settings.context or model.max_positions, model.max_positions)
        self.created = int(time.time())
        batches = BatchSettings(
            settings.max_sequences, settings.max_queue, settings.prefill_tokens, settings.kv_tokens or 0
        )
        self.scheduler: Scheduler = scheduler or open_scheduler(model, batches)
        self.metrics = Metrics(self.scheduler.statistics)
        self.token_texts = TokenTexts(model.tokenizer)
        self.text_ends = generation.end_tokens(model)
        self.draining = self._closed = False
        self.loop: asyncio.AbstractEventLoop
        # One thread reads all prompts: tokenizers take long for long ones, and what guards them is not for several.
        self._reader = ThreadPoolExecutor(1, "prompts")

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that requests are answered in."""
        self.loop = loop

    async def read(self, function: Callable[[], Value]) -> Value:
        """Call what reads a prompt (template, tokenizer, grammar) in the thread for that.

        Raises:
            ApiError: it is a prompt that cannot be read.
        """
        try:
            return await self.loop.run_in_executor(self._reader, function)
        except UserError as error:
            raise from_user_error(error) from None

    def submit(self, request: SequenceRequest, on_event: Callable[[SequenceEvent], None]) -> Handle:
        """Hand a text to the scheduler.

        Raises:
            ApiError: the queue is full, or the server is ending, or the prompt does not fit.
        """
        if self.draining:
            raise busy(503, "The server is shutting down.", 5, "shutting_down")
        try:
            return self.scheduler.submit(request, on_event)
        except QueueFullError as error:
            raise busy(429, "Too many requests are waiting.", error.retry_after, "queue_full") from None
        except SchedulerClosedError as error:
            raise busy(503, error.message, 5, "shutting_down") from None
        except UserError as error:
            raise from_user_error(error) from None

    def close(self) -> None:
        """Cancel all and free what the scheduler holds."""
        if self._closed:
            return
        self._closed = True
        self.scheduler.close()
        self._reader.shutdown(wait=False, cancel_futures=True)


def open_scheduler(model: Model, settings: BatchSettings) -> Scheduler:
    """Batches where the native engine computes, and all of a sequence is in its pages; else one text after another."""
    batches = model.engine == "native" and not model.has_states
    return BatchScheduler(model, settings) if batches else SequentialScheduler(model, settings)
