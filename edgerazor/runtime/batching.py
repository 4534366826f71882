"""Continuous batching: sequences join and leave a running batch at every step of the decoder.

A scheduler owns a decoder and one thread. Whoever has a prompt submits it, from any thread; what becomes of it comes
back event by event. In every step each sequence that decodes gets its next token, and beside them some tokens of
prompts are computed, all in one call of the decoder:

- *first come, first served*: sequences wait in a bounded queue and enter the batch in the order in which they came; the
  oldest ones get memory and the budget of prompt tokens first, so that none starves.
- *memory* is in pages (kv_pages.py). A prompt that begins with what the cache holds, such as a system prompt, the
  earlier turns of a chat, or another copy of it, does not compute that again; while an older sequence is computing it,
  it waits. Where pages run out, the youngest sequence of the batch gives its own back, and is computed again later. The
  oldest one can so get all of them, and a sequence never writes more than they hold: there is always one that goes on.
- *results* of a sequence do not depend on its neighbours, on the division of its prompt, nor on what was shared, to the
  bit where activations are quantized: they are those of `Session`. Where frequencies of RoPE depend on the length of a
  sequence (`Rotary.varies`), its tokens are computed in calls of their own, as a session would, and are not shared.

Greedy sequences, while nobody waits who could join them, are decoded by the loop in C++ that a session uses, some steps
at a time, so that a batch of one is as fast, and those who listen hear of several tokens at once. Whoever comes, and
whoever goes, interrupts the loop after the current step.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgerazor.errors import UserError, plain, usage_error
from edgerazor.kernels.decoder import PAGE_SLOTS, NotFiniteError, PagedSpan
from edgerazor.kernels.memory import physical_memory
from edgerazor.runtime.kv_pages import PagePool, SequencePages, common_length
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.sampling import highest_of
from edgerazor.runtime.token_ids import as_list

__all__ = [
    "BatchScheduler",
    "BatchSettings",
    "FinishReason",
    "Handle",
    "QueueFullError",
    "SchedulerClosedError",
    "SequenceEvent",
    "SequenceRequest",
    "TokenConstraint",
    "TokenLogprob",
    "logprob_of",
]

#: `cancelled`: by its handle, or with the scheduler. Stop strings are the caller's, who cancels.
FinishReason = Literal["eos", "length", "context", "cancelled", "error"]

#: Part of the machine's memory that the cache takes at most, where `kv_tokens` is to be chosen.
MEMORY_SHARE = 1 / 8
#: Tokens for each sequence of the batch, likewise.
TOKENS_EACH = 2048
#: Tokens of a prompt whose log-probabilities are computed in a step at most: their logits take much memory.
LOGPROB_TOKENS = 32
#: Tokens that a sequence has in common with an older one's prompt, beyond what is cached, from which on it waits.
AWAITED_TOKENS = 16
#: Steps, and seconds, that greedy sequences decode at a time at most.
GREEDY_STEPS, GREEDY_SECONDS = 16, 0.1
#: Seconds after which a refused caller may come back: at least, and at most.
RETRY_SECONDS = (1.0, 600.0)
#: The weight of the latest step in the mean duration of steps.
LATEST_WEIGHT = 0.1

log = logging.getLogger(__name__)


class TokenConstraint(Protocol):
    """What may follow, e.g. by a grammar; called from the scheduler's thread, one sequence at a time."""

    def mask(self) -> NDArray[np.bool_] | None:
        """Bool [vocabulary], True for tokens that may follow; None: all of them may."""

    def accept(self, token: int) -> None:
        """Go on behind a token, the one that ends the text included."""


@dataclass(frozen=True)
class BatchSettings:
    """How much is done at once.

    Attributes:
        max_sequences: in the running batch.
        max_queue: waiting; one more is refused.
        prefill_tokens: tokens of prompts that a step computes at most, beside one of each decoding sequence.
        kv_tokens: KV slots (tokens) of all sequences and shared prefixes, in whole pages; 0: chosen from memory.
    """

    max_sequences: int = 16
    max_queue: int = 64
    prefill_tokens: int = 128
    kv_tokens: int = 0


@dataclass(frozen=True)
class SequenceRequest:
    """A text to write.

    Attributes:
        prompt: token ids, at least one.
        sampler: `runtime.sampling.Sampler`, of this text alone.
        max_tokens: to write at most.
        ends: tokens that end the text.
        top_logprobs: None: no log-probabilities; 0: of the chosen token alone; n: of the n likeliest, too.
        prompt_logprobs: log-probabilities of the prompt's own tokens, given with the first event.
        constraint: what may follow.
    """

    prompt: Sequence[int]
    sampler: Any
    max_tokens: int
    ends: frozenset[int]
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: TokenConstraint | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        token: its id.
        logprob: natural logarithm, of the unmodified distribution (softmax of the logits).
        top: the likeliest tokens and their log-probabilities, likeliest first, the first of equal ones.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceEvent:
    """What a step brought a sequence: a token, its end, or both.

    Attributes:
        token: the next one; None where there is none, as for one that ends the text.
        logprob: of the token, where it is wanted.
        finish_reason: why nothing follows; None: more will.
        error: a sentence, with the finish reason "error".
        prompt_logprobs: of the prompt's tokens, None for the first one; with the first event, where they are wanted.
        cached_tokens: of the prompt, found in the cache; with the first event.
    """

    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0


class QueueFullError(Exception):
    """As many sequences wait as may.

    Attributes:
        retry_after: seconds after which there may be a place.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} sequences are waiting already, as many as may")
        self.retry_after = retry_after


class SchedulerClosedError(UserError):
    """The scheduler takes no more sequences: it is shutting down, or has failed."""


class Handle:
    """A submitted sequence."""

    def __init__(self, scheduler: BatchScheduler, sequence: _Sequence) -> None:
        self._scheduler, self._sequence = scheduler, sequence

    def cancel(self) -> None:
        """End the sequence with the next step; an event with finish_reason "cancelled" follows unless it had ended."""
        self._scheduler._cancel(self._sequence)


class _Sequence:
    """A sequence from its submission to its end.

    Attributes:
        order: number of its submission.
        ids: its prompt and the tokens written.
        room: tokens that it may write; `full` is its finish reason then.
        length: of `ids`, as far as they have to be computed again before the next token is chosen, when it entered the
            batch.
        pages: of the KV cache; none while it waits.
        started: whether it has looked for its beginning in the cache, since it entered the batch.
        leader: an older sequence of the batch, whose prompt it begins with, and with how many tokens.
        prompt_logprobs: those so far; None: they are not wanted, or have been given.
    """

    def __init__(
        self, request: SequenceRequest, prompt: list[int], order: int, on_event: Callable[[SequenceEvent], None]
    ) -> None:
        self.request, self.order, self.on_event = request, order, on_event
        self.prompt_length = len(prompt)
        self.ids = prompt
        self.room, self.full = 0, "length"
        self.written = 0
        self.pages: SequencePages
        self.started = False
        self.leader: tuple[_Sequence, int] | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if request.prompt_logprobs else None
        self.cached: int | None = None
        self.first = True
        self.cancelled = False
        self.ended = False
        self.length = len(prompt)

    def __lt__(self, other: _Sequence) -> bool:
        return self.order < other.order

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens have to be computed before the next one can be chosen, beside the latest one."""
        return len(self.ids) - self.pages.length > 1

    @property
    def most_cached(self) -> int:
        """Tokens that need not be computed: no logits after them are wanted."""
        most = len(self.ids) - 1
        return most if self.prompt_logprobs is None else min(most, len(self.prompt_logprobs) - 1)


@dataclass(frozen=True)
class _Span:
    """What a step computes of a sequence: its next `count` tokens."""

    sequence: _Sequence
    count: int

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.pages.length
        return self.sequence.ids[start : start + self.count]

    def outputs(self) -> list[int]:
        """Which of its tokens have logits that are wanted, ascending, counted from the sequence's first."""
        sequence = self.sequence
        start = sequence.pages.length
        end = start + self.count
        wanted: list[int] = []
        if sequence.prompt_logprobs is not None:
            wanted += range(max(start, len(sequence.prompt_logprobs) - 1), min(end, sequence.prompt_length - 1))
        if end == len(sequence.ids) and sequence.room > 0:
            wanted.append(end - 1)
        return wanted


class BatchScheduler:
    """Runs sequences in batches. It owns a decoder and one thread.

    `submit`, `statistics`, `drain`, `close` and the handles may be used from any thread. `on_event` is called from the
    scheduler's, which waits for it: it must not block, nor call `drain` or `close`.

    Args:
        model: of the native engine.
        settings: how much is done at once.

    Raises:
        UserError: another engine runs the model; a setting is out of range; there is not enough memory.
    """

    def __init__(self, model: Any, settings: BatchSettings) -> None:
        if not isinstance(model, NativeModel):
            raise usage_error("Sequences are batched by the native engine, which does not run this model.")
        if model.has_states:
            raise usage_error("Sequences are not batched where layers keep states beside the pages of the KV cache.")
        for name, least in (("max_sequences", 1), ("max_queue", 0), ("prefill_tokens", 1), ("kv_tokens", 0)):
            if type(getattr(settings, name)) is not int or getattr(settings, name) < least:
                raise usage_error(f"{name} is a whole number, at least {least}.")
        self.model, self.settings = model, settings
        self._decoder = model.decoder()
        self._pool = PagePool(self._decoder, _page_count(model, settings))
        self._rotary_tables: Any = None
        self._logits = np.empty((0, model.vocabulary), dtype=np.float32)
        self._condition = threading.Condition()
        self._new: deque[_Sequence] = deque()  # submitted since the last step; the queue with those that wait
        self._waiting: list[_Sequence] = []  # by order
        self._running: list[_Sequence] = []  # by order
        self._submitted = 0
        self._cancels = False
        self._draining = self._closing = False
        self._failed = False
        self._step_seconds = 0.0
        self._greedy_seconds = (0, 0.0)  # of the latest loop in C++: its sequences, and the time of a step
        self._interrupt = np.zeros(1, dtype=np.int32)  # ends such a loop
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._samplers = ThreadPoolExecutor(model.threads, "sampling") if model.threads > 1 else None
        self._thread = threading.Thread(target=self._run, name="batching", daemon=True)
        self._thread.start()

    # What other threads call ------------------------------------------------------------------------------------------

    def submit(self, request: SequenceRequest, on_event: Callable[[SequenceEvent], None]) -> Handle:
        """Let a sequence into the queue.

        Args:
            request: what to write.
            on_event: gets what becomes of it, in order; the last event has a finish reason.

        Raises:
            QueueFullError: as many wait as may.
            UserError: the prompt is longer than the model or the cache has room for, or has no tokens, or unknown ones;
                a number is out of range. SchedulerClosedError: the scheduler is shutting down, or has failed.
        """
        prompt = as_list(request.prompt)
        if not prompt:
            raise usage_error("A prompt has at least one token.")
        self.model.check(prompt)
        if request.max_tokens < 0 or not 0 <= (request.top_logprobs or 0) <= self.model.vocabulary:
            raise usage_error("max_tokens and top_logprobs are at least 0, and there are no more tokens than all.")
        slots = self._pool.capacity * PAGE_SLOTS
        if len(prompt) > slots:
            raise usage_error(
                f"The prompt has {len(prompt):,} tokens, and the cache room for {slots:,}.",
                "Give a shorter one, or the cache more memory.",
            )
        most = min(self.model.max_positions, slots) - len(prompt)
        with self._condition:
            if self._draining or self._closing or self._failed:
                raise SchedulerClosedError("No more requests are taken: the server is shutting down.")
            waiting = len(self._new) + len(self._waiting)
            free = self.settings.max_sequences - len(self._running)
            if waiting >= self.settings.max_queue + max(0, free):
                raise QueueFullError(waiting, self._retry_after())
            sequence = _Sequence(request, prompt, self._submitted, on_event)
            sequence.room = min(request.max_tokens, most)
            sequence.full = "length" if sequence.room == request.max_tokens else "context"
            sequence.pages = SequencePages(self._pool)
            self._submitted += 1
            self._new.append(sequence)
            self._interrupt[0] = 1
            self._condition.notify_all()
        return Handle(self, sequence)

    def statistics(self) -> dict[str, float]:
        """Numbers of the moment, and counts since the beginning.

        running, waiting: sequences. kv_tokens, kv_tokens_used, kv_tokens_cached: KV slots that there may be, that
        sequences have, and that hold what ended ones left. steps, generated_tokens, prompt_tokens, cached_tokens (of
        the prompts' tokens), finished, cancelled, preempted: counts.
        """
        with self._condition:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting) + len(self._new),
                "kv_tokens": self._pool.capacity * PAGE_SLOTS,
                "kv_tokens_used": self._pool.used * PAGE_SLOTS,
                "kv_tokens_cached": self._pool.idle * PAGE_SLOTS,
                **self._counts,
            }

    @property
    def alive(self) -> bool:
        """Whether sequences are computed: it was not closed, and has not failed."""
        return self._thread.is_alive() and not self._failed

    def drain(self, timeout: float) -> bool:
        """Take no new requests, and wait until all have ended; whether they did within so many seconds."""
        with self._condition:
            self._draining = True
            return self._condition.wait_for(lambda: not (self._new or self._waiting or self._running), timeout)

    def close(self) -> None:
        """Cancel all sequences, end the thread, and free the memory."""
        with self._condition:
            self._closing = True
            self._interrupt[0] = 1
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._samplers is not None:
            self._samplers.shutdown()

    def _cancel(self, sequence: _Sequence) -> None:
        with self._condition:
            sequence.cancelled = self._cancels = True
            self._interrupt[0] = 1
            self._condition.notify_all()

    def _retry_after(self) -> float:
        """Seconds until the first sequence of the batch will have ended, if it writes all that it may."""
        steps = min((sequence.room - sequence.written for sequence in self._running), default=1)
        least, most = RETRY_SECONDS
        return min(max(steps * self._step_seconds, least), most)

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._collect():
                began = time.perf_counter()
                if tokens := self._step():
                    weight = LATEST_WEIGHT if self._step_seconds else 1.0
                    self._step_seconds += weight * ((time.perf_counter() - began) / tokens - self._step_seconds)
        except BaseException:
            self._failed = True
            self._end_all("error", "The server has failed; its log says why.")
            raise  # the thread's excepthook prints it
        finally:
            self._closing = True
            self._end_all("cancelled", None)
            self._logits = np.empty((0, 0), dtype=np.float32)
            del self._decoder, self._pool.decoder

    def _collect(self) -> bool:
        """Wait until there is something to do, and take over what other threads brought; False to end."""
        with self._condition:
            while not (self._new or self._waiting or self._running or self._closing):
                self._condition.wait()
            if self._closing:
                return False
            self._interrupt[0] = 0
            while self._new:
                insort(self._waiting, self._new.popleft())
            cancelled: list[_Sequence] = []
            if self._cancels:
                self._cancels = False
                cancelled = [sequence for sequence in (*self._running, *self._waiting) if sequence.cancelled]
        for sequence in cancelled:
            self._end(sequence, SequenceEvent(None, finish_reason="cancelled"))
        return True

    def _step(self) -> int:
        """Compute the next tokens of all sequences; how many of each that decodes, 0 where there were no sequences."""
        if (count := self._greedy_steps()) and (steps := self._decode_greedily(count)):
            return steps
        self._admit()
        spans = self._plan()
        together = [span for span in spans if not self._apart(span)]
        for call in (together, *([span] for span in spans if self._apart(span))):
            if call:
                self._compute(call)
        self._counts["steps"] += bool(spans)
        return int(bool(spans))

    # Greedy sequences side by side ------------------------------------------------------------------------------------

    def _greedy_steps(self) -> int:
        """How many steps the batch decodes in C++; 0 where it has more to do than that."""
        running = self._running
        joining = (self._waiting or self._new) and len(running) < self.settings.max_sequences
        if joining or not running or not all(map(self._decodes_greedily, running)):
            return 0
        if len({sequence.request.ends for sequence in running}) > 1:
            return 0
        sequences, seconds = self._greedy_seconds
        fitting = int(GREEDY_SECONDS / seconds) if sequences == len(running) else 1
        count = max(1, min(GREEDY_STEPS, fitting, *(sequence.room - sequence.written for sequence in running)))
        for sequence in running:
            length = sequence.pages.length + count
            if self.model.rotary.varies(length) or not sequence.pages.grow(length):
                return 0
        return count

    @staticmethod
    def _decodes_greedily(sequence: _Sequence) -> bool:
        """Whether nothing but the likeliest next token is wanted of a sequence."""
        request = sequence.request
        plain_tokens = request.sampler.plain and request.constraint is None and request.top_logprobs is None
        return plain_tokens and sequence.written > 0 and len(sequence.ids) - sequence.pages.length == 1

    def _decode_greedily(self, count: int) -> int:
        """Decode some steps of all sequences; how many, 0 where that fails."""
        running = list(self._running)
        spans = [PagedSpan(sequence.pages.table, sequence.pages.length, 1) for sequence in running]
        longest = max(span.past_length for span in spans)
        self._set_rope(min(span.past_length for span in spans), longest + count)
        began = time.perf_counter()
        try:
            tokens = [sequence.ids[-1] for sequence in running]
            ends = sorted(running[0].request.ends)
            steps = self._decoder.greedy_together(spans, tokens, count, ends, self._interrupt)
        except (NotFiniteError, MemoryError):  # the step that finds out whose they are begins at the same place
            return 0
        self._greedy_seconds = (len(running), (time.perf_counter() - began) / len(steps))
        self._counts["steps"] += len(steps)
        for sequence, *tokens in zip(running, *steps, strict=True):
            sequence.pages.append([sequence.ids[-1], *tokens[:-1]])
            for token in tokens:
                if not sequence.ended and not sequence.cancelled:
                    self._add_token(sequence, token, None)
        return len(steps)

    # Who is in the batch ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let the oldest sequences that wait into the batch, as long as there are places, and pages for what they need.

        Pages that sequences of the batch will need for what they have still to read are not available to others, nor is
        one for each that decodes.
        """
        while self._waiting and len(self._running) < self.settings.max_sequences:
            sequence = self._waiting[0]
            pages, last, common = self._pool.find(sequence.ids, sequence.most_cached)
            cached = len(pages) * PAGE_SLOTS + common
            sequence.leader = self._leader(sequence, cached)
            shared = max(len(pages), sequence.leader[1] // PAGE_SLOTS if sequence.leader else 0)
            owed = sum(_pages_for(len(other.ids) + 1) - len(other.pages) for other in self._running)
            idle = sum(page.users == 0 for page in pages) + (last is not None and last.users == 0)
            if self._running and _pages_for(len(sequence.ids) + 1) - shared > self._pool.available - idle - owed:
                return
            with self._condition:
                del self._waiting[0]
                insort(self._running, sequence)
            sequence.started = False

    def _leader(self, sequence: _Sequence, cached: int) -> tuple[_Sequence, int] | None:
        """The sequence of the batch that will compute most of what this one begins with, and how much that is."""
        longest, best = cached + AWAITED_TOKENS - 1, None
        for other in self._running:
            if other < sequence and other.is_prefilling:
                common = min(common_length(other.ids, sequence.ids), sequence.most_cached)
                if common > longest:
                    longest, best = common, other
        return None if best is None else (best, longest)

    def _preempt(self, sequence: _Sequence) -> None:
        """Take a sequence out of the batch to compute it again later."""
        sequence.pages.release()
        self._counts["preempted"] += 1
        with self._condition:
            self._running.remove(sequence)
            insort(self._waiting, sequence)

    # What a step computes ---------------------------------------------------------------------------------------------

    def _plan(self) -> list[_Span]:
        """What the next step computes: the oldest sequences get pages and the budget of prompt tokens first."""
        spans: list[_Span] = []
        budget = self.settings.prefill_tokens
        for sequence in list(self._running):
            if sequence not in self._running:  # preempted for an older one
                continue
            if not sequence.started and not self._start(sequence):
                continue
            count = self._count(sequence, budget)
            if count and self._get_pages(sequence, sequence.pages.length + count):
                budget -= count if sequence.is_prefilling else 0
                spans.append(_Span(sequence, count))
        return spans

    def _start(self, sequence: _Sequence) -> bool:
        """Look for the beginning of a sequence in the cache; False while an older one is about to compute it."""
        if sequence.leader is not None:
            leader, common = sequence.leader
            if leader in self._running and leader.is_prefilling and leader.pages.length < common:
                return False
            sequence.leader = None
        cached = 0
        if not self.model.rotary.varies(sequence.prompt_length):
            cached = sequence.pages.begin(sequence.ids, min(sequence.most_cached, self._fixed(len(sequence.ids))))
        if sequence.cached is None:
            sequence.cached = cached
            self._counts["prompt_tokens"] += sequence.prompt_length
            self._counts["cached_tokens"] += cached
            sequence.request.sampler.see(sequence.ids)
        sequence.started = True
        return True

    def _fixed(self, length: int) -> int:
        """How many of so many tokens have frequencies that depend on nothing but their positions."""
        beyond = self.model.rotary.varies_beyond
        return length if beyond is None else min(length, beyond)

    def _count(self, sequence: _Sequence, budget: int) -> int:
        """How many tokens of a sequence the next step computes."""
        done, rotary = sequence.pages.length, self.model.rotary
        if done < sequence.prompt_length and rotary.varies(sequence.prompt_length):
            count = sequence.prompt_length - done
        elif rotary.varies(done + 1):
            return 1
        else:
            count = self._fixed(len(sequence.ids)) - done
        if count > 1:
            count = min(count, budget)
        if sequence.prompt_logprobs is not None:
            count = min(count, LOGPROB_TOKENS)
        return count

    def _get_pages(self, sequence: _Sequence, length: int) -> bool:
        """Pages for so many tokens, those of the youngest sequences if need be; False where there are none for it."""
        while not sequence.pages.grow(length):
            youngest = self._running[-1]
            if youngest is sequence and len(self._running) == 1:
                self._fail(sequence, "There is not enough memory for so long a sequence.")
                return False
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _apart(self, span: _Span) -> bool:
        """Whether frequencies depend on the length of the sequence, so that it has a call of its own."""
        return self.model.rotary.varies(self._rope_length(span))

    def _rope_length(self, span: _Span) -> int:
        """The length of the sequence that frequencies may depend on: a session reads the prompt in one call."""
        sequence = span.sequence
        done = sequence.pages.length
        whole = done < sequence.prompt_length and self.model.rotary.varies(sequence.prompt_length)
        return sequence.prompt_length if whole else done + span.count

    def _compute(self, spans: list[_Span]) -> None:
        """One call of the decoder; spans whose numbers are not finite are found one by one."""
        try:
            with self.model.errors_for_people():
                outputs, best, totals = self._call(spans)
        except UserError as error:
            if len(spans) == 1:
                self._fail(spans[0].sequence, error.message)
            else:
                for span in spans:
                    self._compute([span])
            return
        self._take_tokens(spans, outputs, best, totals)

    def _call(self, spans: list[_Span]) -> tuple[list[list[int]], NDArray[np.int32], NDArray[np.float32]]:
        """The outputs of each span, and of all outputs the likeliest tokens and the logarithms of the totals."""
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[bool] = []
        outputs = [span.outputs() for span in spans]
        calls: list[PagedSpan] = []
        for span, of_span in zip(spans, outputs, strict=True):
            sequence = span.sequence
            start = sequence.pages.length
            positions += [len(tokens) + output - start for output in of_span]
            wanted += [sequence.request.top_logprobs is not None or output < sequence.prompt_length - 1
                       for output in of_span]  # fmt: skip
            tokens += span.tokens
            calls.append(PagedSpan(sequence.pages.table, start, span.count))
        self._set_rope(min(call.past_length for call in calls), max(map(self._rope_length, spans)))
        if len(self._logits) < len(positions):
            rows = max(len(positions), min(2 * len(self._logits), self.settings.max_sequences))
            self._logits = np.empty((rows, self.model.vocabulary), dtype=np.float32)
        return outputs, *self._decoder.step(calls, tokens, positions, wanted, self._logits)

    def _set_rope(self, start: int, length: int) -> None:
        """Prepare for a call with positions `start` to `length`."""
        tables = self.model.rotary.tables(start, length)
        if tables is not self._rotary_tables:
            self._decoder.set_rope(*tables)
            self._rotary_tables = tables

    # What comes of it -------------------------------------------------------------------------------------------------

    def _take_tokens(
        self, spans: list[_Span], outputs: list[list[int]], best: NDArray[np.int32], totals: NDArray[np.float32]
    ) -> None:
        """Note what was computed, choose the next tokens, and tell of them."""
        row = 0
        rows: list[tuple[_Sequence, int]] = []
        for span, of_span in zip(spans, outputs, strict=True):
            sequence = span.sequence
            tokens, shared = span.tokens, not self._apart(span)
            for output in of_span:
                if output < sequence.prompt_length - 1 and sequence.prompt_logprobs is not None:
                    top = sequence.request.top_logprobs or 0
                    following = sequence.ids[output + 1]
                    sequence.prompt_logprobs.append(logprob_of(self._logits[row], totals[row], following, top))
                else:
                    rows.append((sequence, row))
                row += 1
            sequence.pages.append(tokens, shared)
            if sequence.room == 0 and sequence.pages.length == len(sequence.ids):
                self._end(sequence, SequenceEvent(None, finish_reason=sequence.full))  # type: ignore[arg-type]
        choices = self._choose(rows, best)
        for (sequence, row), choice in zip(rows, choices, strict=True):
            if isinstance(choice, str):
                self._fail(sequence, choice)
                continue
            wanted, logprob = sequence.request.top_logprobs, None
            if wanted is not None and choice not in sequence.request.ends:
                logprob = logprob_of(self._logits[row], totals[row], choice, wanted)
            self._add_token(sequence, choice, logprob)

    def _choose(self, rows: list[tuple[_Sequence, int]], best: NDArray[np.int32]) -> list[int | str]:
        """The next token of each sequence; a sentence where there is none."""
        choices: list[int | str] = [0] * len(rows)
        sampled: list[tuple[int, _Sequence, NDArray[np.float32]]] = []
        for index, (sequence, row) in enumerate(rows):
            logits = self._logits[row]
            if best[row] < 0:
                choices[index] = f"{self.model.folder} computes logits that are not finite."
                continue
            if sequence.request.sampler.plain and sequence.request.constraint is None:
                choices[index] = int(best[row])
                continue
            try:
                sampled.append((index, sequence, self._allowed(sequence, logits)))
            except Exception as error:
                choices[index] = _sentence(error)
        several = self._samplers is not None and len(sampled) > 1
        run: Any = self._samplers.map if several and self._samplers is not None else map
        for (index, *_), choice in zip(sampled, run(_sample, sampled), strict=True):
            choices[index] = choice
        return choices

    def _allowed(self, sequence: _Sequence, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits, -infinity for tokens that may not follow."""
        constraint = sequence.request.constraint
        mask = constraint.mask() if constraint is not None else None
        if mask is None:
            return logits
        if not mask.any():
            raise UserError("No token may follow, by the constraint of the answer.")
        return np.where(mask, logits, np.float32(-np.inf))

    def _add_token(self, sequence: _Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Note the next token of a sequence, and tell of it."""
        request = sequence.request
        try:
            if request.constraint is not None:
                request.constraint.accept(token)
        except Exception as error:
            self._fail(sequence, _sentence(error))
            return
        if not request.sampler.plain:
            request.sampler.see([token])
        if token in request.ends:
            self._end(sequence, SequenceEvent(None, finish_reason="eos"))
            return
        sequence.ids.append(token)
        sequence.written += 1
        self._counts["generated_tokens"] += 1
        if sequence.written == sequence.room:
            self._end(sequence, SequenceEvent(token, logprob, sequence.full))  # type: ignore[arg-type]
        else:
            self._tell(sequence, SequenceEvent(token, logprob))

    def _fail(self, sequence: _Sequence, sentence: str) -> None:
        self._end(sequence, SequenceEvent(None, finish_reason="error", error=sentence))

    def _end(self, sequence: _Sequence, event: SequenceEvent) -> None:
        """Take a sequence out, give its pages back, and tell of its end."""
        if sequence.ended:
            return
        sequence.ended = True
        sequence.pages.release()
        self._tell(sequence, event)
        with self._condition:
            for place in (self._running, self._waiting):
                if sequence in place:
                    place.remove(sequence)
            self._counts["cancelled" if event.finish_reason == "cancelled" else "finished"] += 1
            self._condition.notify_all()

    def _end_all(self, reason: FinishReason, sentence: str | None) -> None:
        with self._condition:
            left = [*self._running, *self._waiting, *self._new]
            self._new.clear()
        for sequence in left:
            self._end(sequence, SequenceEvent(None, finish_reason=reason, error=sentence))

    def _tell(self, sequence: _Sequence, event: SequenceEvent) -> None:
        """Give an event to whoever waits for it; with the first one, what the prompt brought."""
        if sequence.first:
            sequence.first = False
            of_prompt = sequence.prompt_logprobs if event.finish_reason not in ("error", "cancelled") else None
            event = SequenceEvent(
                event.token,
                event.logprob,
                event.finish_reason,
                event.error,
                None if of_prompt is None else tuple(of_prompt),
                sequence.cached or 0,
            )
            sequence.prompt_logprobs = None
        try:
            sequence.on_event(event)
        except Exception:
            log.exception("whoever waits for a sequence failed at its event; the sequence is cancelled")
            sequence.cancelled = self._cancels = True


#: What is counted since the beginning.
_COUNTS = ("steps", "generated_tokens", "prompt_tokens", "cached_tokens", "finished", "cancelled", "preempted")


def _sample(sampled: tuple[int, _Sequence, NDArray[np.float32]]) -> int | str:
    """The token that a sequence's sampler chooses; a sentence where it chooses none."""
    _, sequence, logits = sampled
    try:
        return int(sequence.request.sampler.choose(logits))
    except Exception as error:
        return _sentence(error)


def logprob_of(logits: NDArray[np.float32], log_total: np.float32, token: int, top: int) -> TokenLogprob:
    """How likely a token was, and which were the likeliest, by logits [vocabulary]."""
    total = float(log_total)
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        candidates = highest_of(logits, top) if top < len(logits) else np.arange(len(logits))
        order = np.argsort(-logits[candidates], kind="stable")[:top]
        likeliest = tuple((int(candidate), float(logits[candidate]) - total) for candidate in candidates[order])
    return TokenLogprob(token, float(logits[token]) - total, likeliest)


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return error.message
    log.error("a token could not be chosen", exc_info=error)
    return f"The next token could not be chosen: {plain(error)}."


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SLOTS)


def _page_count(model: NativeModel, settings: BatchSettings) -> int:
    """Pages of the cache: those asked for, or as many as suit the model within a part of the memory."""
    if settings.kv_tokens:
        return max(1, settings.kv_tokens // PAGE_SLOTS)
    suitable = max(model.max_positions, settings.max_sequences * TOKENS_EACH)
    affordable = int(physical_memory() * MEMORY_SHARE) // max(1, model.cache_bytes_per_token)
    return max(1, min(_pages_for(suitable), affordable // PAGE_SLOTS))
