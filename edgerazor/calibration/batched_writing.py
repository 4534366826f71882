"""What the native engine writes for a teacher: many texts side by side, each one drawn by a seed of its own.

A text depends on its prompt, the sampling and its seed alone, to the bit: not on its neighbours in the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgerazor.errors import UserError
from edgerazor.recipe import Generate, Sampling
from edgerazor.runtime.batching import BatchScheduler, BatchSettings, Handle, SequenceEvent, SequenceRequest
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.sampling import Sampler

#: Texts of a batch that wait for others to end; those of the batch before may not have ended, either.
MOST_WAITING = 1 << 16
#: Whether a batch has brought enough, by how many tokens it has so far; it then ends where it is.
Enough = Callable[[int], bool]


@dataclass(frozen=True)
class WritingRequest:
    """A text to be written.

    Attributes:
        prompt: token ids, at least one.
        most: tokens to write at most.
        seed: of what is drawn.
    """

    prompt: Sequence[int]
    most: int
    seed: int


class NativeWriter:
    """A model of the native engine that writes texts side by side.

    Args:
        model: of the native engine, without states beside its KV cache.
        side_by_side: texts that are written at once.

    Raises:
        UserError: as `BatchScheduler`.
    """

    def __init__(self, model: NativeModel, side_by_side: int) -> None:
        self.model = model
        self._scheduler = BatchScheduler(model, BatchSettings(max_sequences=side_by_side, max_queue=MOST_WAITING))

    def write(
        self,
        requests: Sequence[WritingRequest],
        sampling: Sampling,
        ends: frozenset[int],
        unending: bool = False,
        enough: Enough | None = None,
    ) -> list[list[int]]:
        """The tokens that are written behind each prompt, the one that ends a text not among them.

        Args:
            requests: the texts; where they are more than are written side by side, some wait.
            sampling: how tokens are drawn.
            ends: tokens that end a text.
            unending: no text ends before it has all its tokens.
            enough: asked after every token; None writes all texts to their ends.

        Raises:
            UserError: a sequence cannot be computed.
        """
        settings = Generate()
        if sampling.temperature > 0:
            settings = Generate(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        batch = _Batch([[] for _ in requests], enough)
        handles: list[Handle] = []
        try:
            for number, request in enumerate(requests):
                sequence = SequenceRequest(
                    prompt=request.prompt,
                    sampler=Sampler(settings, request.seed, self.model.vocabulary),
                    max_tokens=request.most,
                    ends=ends,
                    constraint=_Without(ends, self.model.vocabulary) if unending and ends else None,
                )
                handles.append(self._scheduler.submit(sequence, batch.listener(number)))
            batch.wait()
        finally:
            for handle in handles:
                handle.cancel()
        if batch.error is not None:
            raise UserError(batch.error)
        return batch.texts

    def close(self) -> None:
        """End its thread and free its memory."""
        self._scheduler.close()


class _Batch:
    """Texts that are being written; the listeners are called from the scheduler's thread.

    Attributes:
        texts: token ids of each, so far.
        error: why one of them cannot be written.
    """

    def __init__(self, texts: list[list[int]], enough: Enough | None) -> None:
        self.texts = texts
        self.error: str | None = None
        self._enough, self._tokens, self._open = enough, 0, len(texts)
        self._done = threading.Event()

    def listener(self, number: int) -> Callable[[SequenceEvent], None]:
        """What hears of the text of this number."""

        def listen(event: SequenceEvent) -> None:
            if self._done.is_set():  # what comes after the end of a batch depends on how fast it is heard of
                return
            if event.token is not None:
                self.texts[number].append(event.token)
                self._tokens += 1
            if event.error is not None:
                self.error = event.error
            self._open -= event.finish_reason is not None
            if self.error or not self._open or (self._enough is not None and self._enough(self._tokens)):
                self._done.set()

        return listen

    def wait(self) -> None:
        """Until all are written, or enough."""
        if self._open:
            self._done.wait()


class _Without:
    """Every token may follow but some."""

    def __init__(self, tokens: frozenset[int], vocabulary: int) -> None:
        self._mask = np.ones(vocabulary, dtype=np.bool_)
        self._mask[[token for token in tokens if token < vocabulary]] = False

    def mask(self) -> NDArray[np.bool_]:
        return self._mask

    def accept(self, token: int) -> None:
        """Any token is as good as another."""
