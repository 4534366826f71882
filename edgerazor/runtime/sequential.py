"""One text after the other: the scheduler of engines that have no batches.

It offers what `runtime.batching.BatchScheduler` does, on a session of any engine: a bounded queue, tokens as they come,
cancelling between two of them. What a prompt has in common with the text before it is not computed again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgerazor.errors import UserError, usage_error
from edgerazor.runtime.batching import (
    BatchSettings,
    FinishReason,
    QueueFullError,
    SchedulerClosedError,
    SequenceEvent,
    SequenceRequest,
    TokenLogprob,
    logprob_of,
)
from edgerazor.runtime.engine import Model, Session
from edgerazor.runtime.generation import rewind_to

#: Bytes of logits of a whole prompt up to which they are computed in one call; of longer ones token by token.
MOST_LOGITS_BYTES = 256 * 2**20
#: Seconds after which a refused client may try again.
RETRY_AFTER = 2.0

OnEvent = Callable[[SequenceEvent], None]


class SequentialHandle:
    """A text that was submitted, waiting or being written."""

    def __init__(self, scheduler: SequentialScheduler, request: SequenceRequest, on_event: OnEvent) -> None:
        self.scheduler, self.request, self.on_event = scheduler, request, on_event
        self.cancelled = False

    def cancel(self) -> None:
        """Write no more of it; may be called again, and after its end."""
        self.cancelled = True
        self.scheduler.wake()


class SequentialScheduler:
    """Writes one text at a time, in a thread of its own.

    Args:
        model: of any engine.
        settings: of these, `max_queue` and `prefill_tokens` count.
    """

    def __init__(self, model: Model, settings: BatchSettings) -> None:
        self.model, self.settings = model, settings
        self._condition = threading.Condition()
        self._waiting: deque[SequentialHandle] = deque()
        self._running: SequentialHandle | None = None
        self._draining = self._closed = False
        self._counts = dict.fromkeys(
            ("generated_tokens", "prompt_tokens", "cached_tokens", "steps", "cancelled", "finished"), 0.0
        )
        self._session: Session = model.session()
        self._thread = threading.Thread(target=self._loop, name="sequential scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: SequenceRequest, on_event: OnEvent) -> SequentialHandle:
        """Queue a text; `on_event` is called from the scheduler's thread.

        Raises:
            QueueFullError: too many are waiting.
            UserError: the prompt is too long, or has unknown tokens. SchedulerClosedError: no more are taken.
        """
        if not request.prompt:
            raise usage_error("A prompt has at least one token.")
        self.model.check(request.prompt)
        handle = SequentialHandle(self, request, on_event)
        with self._condition:
            if self._draining or self._closed:
                raise SchedulerClosedError("No more requests are taken: the server is shutting down.")
            waiting = sum(not other.cancelled for other in self._waiting)
            if waiting > self.settings.max_queue or (waiting == self.settings.max_queue and self._running is not None):
                raise QueueFullError(waiting, RETRY_AFTER)
            self._waiting.append(handle)
            self._condition.notify_all()
        return handle

    def statistics(self) -> dict[str, float]:
        """Counts since the beginning, and what there is now."""
        with self._condition:
            return {
                "running": float(self._running is not None),
                "waiting": float(len(self._waiting)),
                "kv_tokens": float(self.model.max_positions),
                "kv_tokens_used": float(self._session.position),
                **self._counts,
            }

    def drain(self, timeout: float) -> bool:
        """Take no more; True when all that there were ended within so many seconds."""
        with self._condition:
            self._draining = True
            return self._condition.wait_for(lambda: not self._waiting and self._running is None, timeout)

    def close(self) -> None:
        """Cancel all, and end the thread."""
        with self._condition:
            self._closed = True
            for handle in [*self._waiting, *([self._running] if self._running else [])]:
                handle.cancelled = True
            self._condition.notify_all()
        self._thread.join()

    def wake(self) -> None:
        """Let the thread see what was cancelled."""
        with self._condition:
            self._condition.notify_all()

    # In the thread ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (handle := self._next()) is not None:
            try:
                for event in self._write(handle):
                    self._tell(handle, event)
                    self._sweep()
            except UserError as error:
                self._fail(handle, f"{error.message} {error.hint}".strip())
            except Exception as error:  # an engine's; the next text gets a fresh session
                self._fail(handle, f"The model could not go on ({type(error).__name__}).")
            with self._condition:
                self._running = None
                self._condition.notify_all()

    def _next(self) -> SequentialHandle | None:
        """The next text to write; None at the end."""
        while True:
            self._sweep()
            with self._condition:
                if self._waiting:
                    self._running = self._waiting.popleft()
                    return self._running
                if self._closed:
                    return None
                self._condition.wait()

    def _sweep(self) -> None:
        """Take out what was cancelled while it waited."""
        with self._condition:
            gone = [handle for handle in self._waiting if handle.cancelled]
            self._waiting = deque(handle for handle in self._waiting if not handle.cancelled)
            self._condition.notify_all()
        for handle in gone:
            self._tell(handle, SequenceEvent(None, finish_reason="cancelled"))

    def _tell(self, handle: SequentialHandle, event: SequenceEvent) -> None:
        with self._condition:
            self._counts["generated_tokens"] += event.token is not None
            if event.finish_reason is not None:
                self._counts["cancelled" if event.finish_reason == "cancelled" else "finished"] += 1
        handle.on_event(event)

    def _fail(self, handle: SequentialHandle, sentence: str) -> None:
        self._session = self.model.session()
        self._tell(handle, SequenceEvent(None, finish_reason="error", error=sentence))

    def _write(self, handle: SequentialHandle) -> Iterator[SequenceEvent]:
        """Read a prompt, choose tokens."""
        request, session = handle.request, self._session
        if handle.cancelled:
            yield SequenceEvent(None, finish_reason="cancelled")
            return
        of_prompt = self._prompt_logprobs(request) if request.prompt_logprobs else None
        cached = rewind_to(session, request.prompt)
        logits: Any = None
        for start in range(cached, len(request.prompt), self.settings.prefill_tokens):
            logits = session.feed(request.prompt[start : start + self.settings.prefill_tokens])
            if handle.cancelled:
                yield SequenceEvent(None, finish_reason="cancelled")
                return
        with self._condition:
            self._counts["prompt_tokens"] += len(request.prompt)
            self._counts["cached_tokens"] += cached
        first: dict[str, Any] = {"prompt_logprobs": of_prompt, "cached_tokens": cached}
        request.sampler.see(request.prompt)
        room = min(request.max_tokens, self.model.max_positions - len(request.prompt))
        reason: FinishReason = "length" if room == request.max_tokens else "context"
        if room <= 0:
            yield SequenceEvent(None, finish_reason=reason, **first)
        for left in range(room, 0, -1):
            token, logprob = self._choose(request, logits.numpy())
            if token in request.ends or handle.cancelled:
                ending: FinishReason = "eos" if token in request.ends else "cancelled"
                yield SequenceEvent(None, finish_reason=ending, **first)
                return
            yield SequenceEvent(token, logprob, None if left > 1 else reason, **first)
            first = {}
            if left > 1:
                logits = session.feed([token])

    def _choose(self, request: SequenceRequest, logits: NDArray[np.float32]) -> tuple[int, TokenLogprob | None]:
        """The next token, noted where it has to be, and its log-probability where it is wanted."""
        scores, constraint = logits, request.constraint
        if constraint is not None and (mask := constraint.mask()) is not None:
            scores = np.where(mask, logits, np.float32(-np.inf))
        token = request.sampler.choose(scores)
        request.sampler.see([token])
        if constraint is not None:
            constraint.accept(token)
        with self._condition:
            self._counts["steps"] += 1
        return token, None if request.top_logprobs is None else token_logprob(logits, token, request.top_logprobs)

    def _prompt_logprobs(self, request: SequenceRequest) -> tuple[TokenLogprob | None, ...]:
        """Log-probabilities of the prompt's tokens but for the first, each after those before it."""
        prompt, top = list(request.prompt), request.top_logprobs or 0
        rows: Iterator[Any]
        if 4 * len(prompt) * self.model.vocabulary <= MOST_LOGITS_BYTES and len(prompt) > 1:
            rows = iter(self.model.logits(prompt[:-1]))
        else:
            self._session.rewind(0)
            rows = (self._session.feed([token]) for token in prompt[:-1])
        return (None, *(token_logprob(row.numpy(), token, top) for token, row in zip(prompt[1:], rows, strict=True)))


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """A token's log-probability, and those of the `top` likeliest tokens, by logits [V]."""
    scores = logits.astype(np.float64)
    highest = scores.max()
    return logprob_of(logits, np.float32(highest + np.log(np.exp(scores - highest).sum())), token, top)
