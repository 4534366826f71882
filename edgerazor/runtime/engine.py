"""What every engine offers: logits, scores of continuations, and sequences with a cache."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from edgerazor import models, transformers_plugin
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.models import PreTrainedTokenizerBase
from edgerazor.pictures import PictureReader
from edgerazor.runtime import generation
from edgerazor.runtime.generation import Chat, Generation, Prompt, Stream
from edgerazor.runtime.picture_prompts import Picture
from edgerazor.runtime.scoring import Score, ScoreInput, ScoreRequest
from edgerazor.runtime.token_ids import Ids, as_list, as_tensor


class Model(ABC):
    """A packed model, ready to compute. Computes in float32 between quantized products, on a CPU, without gradients.

    Attributes:
        folder: where it is from.
        tokenizer: of transformers.
        threads: that compute.
        engine: `native` or `transformers`.
        note: why the native engine is not used and what to do about it, in a sentence or two; None where it is.
        vocabulary: columns of logits.
        max_positions: tokens that a sequence can have.
        weight_bytes: that the weights take in memory.
        bytes_per_token: of weights that are read to decode a token, without the cache.
        cache_bytes_per_token: that a token of a sequence adds to its cache.
        tower: whose features of pictures it reads (`models.PictureTable.view`).
        has_states: layers keep states of a sequence beside its cache, which sequences of a batch cannot share by pages.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    threads: int
    engine: str
    note: str | None
    vocabulary: int
    max_positions: int
    weight_bytes: int
    bytes_per_token: int
    cache_bytes_per_token: int
    has_states: bool = False
    tower: str = ""

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Names of the kernels that multiply, as `edgerazor.kernels.name` has them: `avx512`, `avx512, reference`."""

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """The folder's configuration."""
        config: PreTrainedConfig = models.auto_config(self.folder)
        return config

    @functools.cached_property
    def generation_config(self) -> GenerationConfig:
        """End-of-text tokens and other defaults of transformers' `generate`."""
        return models.generation_config(self.folder) or GenerationConfig.from_model_config(self.config)

    @functools.cached_property
    def pictures(self) -> PictureReader | None:
        """What reads pictures for it; None where it sees none. Its tower computes in transformers, in float32."""
        if not models.sees(self.config):
            return None
        return PictureReader(self.folder, lambda: transformers_plugin.load(self.folder)[0], str(self.folder))

    @abstractmethod
    def session(self) -> Session:
        """A new session, whose sequence has no tokens yet."""

    def logits(self, ids: Ids | Sequence[Sequence[int]], last: int | None = None) -> Tensor:
        """Logits float32 [..., T, V]; of the last tokens [..., last, V] alone where `last` is given.

        Args:
            ids: int64 [T] or [B, T], or lists of that shape; at least one token.
            last: 1 to T.

        Raises:
            UserError: there is no token, or no such token, or there are more than `max_positions`.
        """
        tokens = as_tensor(ids)
        if tokens.dim() not in (1, 2) or tokens.numel() == 0:
            raise usage_error(f"Tokens have the shape [T] or [B, T], each at least 1, not {list(tokens.shape)}.")
        self.check(tokens)
        count = tokens.shape[-1] if last is None else last
        if type(count) is not int or not 1 <= count <= tokens.shape[-1]:
            raise usage_error(f"There are no logits of the last {last} of {tokens.shape[-1]} tokens.")
        logits = self._logits(tokens.reshape(-1, tokens.shape[-1]), count)
        return logits.reshape(*tokens.shape[:-1], count, self.vocabulary)

    def score(self, requests: Sequence[ScoreInput]) -> list[list[Score]]:
        """Score continuations by their probability.

        Args:
            requests: each a prefix of at least one token, and its continuations, likewise; and perhaps how many of the
                last tokens of each continuation count, all if not given. What is before them is then read but not
                scored, as where a continuation is a question with its answer, and the prefix is what all questions
                have before them. The last token of a continuation is not read, and needs no position.

        Returns:
            a score for each continuation of each request.

        Raises:
            UserError: as `logits`; or a count is not from 1 to the tokens of its continuation.
        """
        checked = []
        for prefix, continuations, *counts in requests:
            tokens = [as_list(continuation) for continuation in continuations]
            checked.append(ScoreRequest(as_list(prefix), tokens, list(*counts) if counts else [*map(len, tokens)]))
        for request in checked:
            self._check_request(request)
        return self._score(checked)

    def _check_request(self, request: ScoreRequest) -> None:
        if not request.prefix or not all(request.continuations):
            raise usage_error("A prefix and its continuations need at least one token each.")
        self.check(request.prefix)
        if len(request.counts) != len(request.continuations):
            raise usage_error(f"There are {len(request.counts)} counts for {len(request.continuations)} continuations.")
        for tokens, count in zip(request.continuations, request.counts, strict=True):
            self.check(tokens[-1:])
            self.check(tokens[:-1], len(request.prefix))
            if type(count) is not int or not 1 <= count <= len(tokens):
                raise usage_error(f"There are no last {count} of the {len(tokens)} tokens of a continuation.")

    def generate(self, prompt: Prompt, seed: int = 0, images: Sequence[Picture] = (), **options: Any) -> Generation:
        """Write a text that goes on from a prompt, or answers it.

        Args:
            prompt: a text; with `chat=True` the user's turn, or all messages so far.
            seed: of the sampling.
            images: that the user's turn begins with, which makes it a chat: files, bytes of them, or Pillow's.
            options: fields of a recipe's `generate` section (`edgerazor show recipe` explains them): max_tokens,
                temperature, top_k, top_p, min_p, repetition_penalty, stop, chat, system.

        Raises:
            UserError: an option is unknown or has a wrong value; the prompt is too long, or no text; there is no chat
                template, or it refuses the messages; the model sees no pictures, or one of them cannot be read.
        """
        stream = self.stream(prompt, seed, images, **options)
        for _ in stream:
            pass
        return stream.generation

    def stream(self, prompt: Prompt, seed: int = 0, images: Sequence[Picture] = (), **options: Any) -> Stream:
        """As `generate`, but the text in pieces as they are written; `Stream.generation` holds the whole at the end."""
        if images:
            options = {**options, "chat": True}
        return generation.stream(self, prompt, *generation.options(seed, **options), images)

    def chat(self, seed: int = 0, **options: Any) -> Chat:
        """A conversation, whose `ask` gives the answers; options as of `generate`."""
        return Chat(self, *generation.options(seed, **{**options, "chat": True}))

    def check(self, tokens: Ids, before: int = 0) -> None:
        """Make sure that tokens [T] or [B, T] are of the vocabulary, and fit behind the `before` tokens of a sequence.

        Raises:
            UserError: they are not.
        """
        ids = as_tensor(tokens)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            known = models.PICTURES if self.pictures else ()
            wrong = (token for token in ids.flatten().tolist() if not 0 <= token < self.vocabulary)
            if (token := next((token for token in wrong if token not in known), None)) is not None:
                raise usage_error(f"There is no token {token}: the model knows {self.vocabulary}.")
        if before + ids.shape[-1] > self.max_positions:
            raise usage_error(
                f"A sequence of {before + ids.shape[-1]} tokens is too long: the model has positions for "
                f"{self.max_positions}."
            )

    @abstractmethod
    def _logits(self, tokens: Tensor, last: int) -> Tensor:
        """Logits [B, last, V] of checked tokens [B, T]."""

    @abstractmethod
    def _score(self, requests: list[ScoreRequest]) -> list[list[Score]]:
        """`score` of checked requests."""


class Session(ABC):
    """A sequence of tokens and its KV cache.

    Attributes:
        model: what computes.
        ids: its tokens so far.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ids: list[int] = []
        self._computed = 0  # tokens in the cache: all of them, or all but those written last
        self._best: int | None = None  # the most probable token after `ids`, where it is known

    @property
    def position(self) -> int:
        """Number of tokens so far."""
        return len(self.ids)

    def feed(self, ids: Ids) -> Tensor:
        """Append tokens, at least one, and give the logits float32 [V] after the last of them.

        Raises:
            UserError: as `Model.logits`; the sequence is then as it was.
        """
        tokens = as_list(ids)
        if not tokens:
            raise usage_error("There is no token to feed.")
        self.model.check(tokens, self.position)
        logits = self._compute(self._computed, [*self.ids[self._computed :], *tokens])
        self.ids += tokens
        self._computed = self.position
        self._best = int(logits.numpy().argmax())  # NumPy's: torch's threads would spin beside the native ones
        if not math.isfinite(logits[self._best]):  # argmax gives the first NaN, where there is one
            self._best = None
            raise UserError(f"{self.model.folder} computes logits that are not finite.", "Pack the model again.")
        return logits

    def greedy(self, count: int, stops: Collection[int] = ()) -> list[int]:
        """Append the most probable token (the first of equal ones), again and again.

        Args:
            count: of tokens, at most; fewer where the positions end.
            stops: token ids behind which to stop.

        Returns:
            the new tokens, a stop at their end too.

        Raises:
            UserError: there is nothing to continue.
        """
        if type(count) is not int or count < 0:
            raise usage_error(f"A number of tokens is a whole one, at least 0, not {plain(count, 50)}.")
        if not self.ids:
            raise usage_error("There is nothing to continue: feed at least one token first.")
        start = self.position
        end = min(start + count, self.model.max_positions)
        if self._best is not None and start < end:
            self.ids.append(self._best)
            self._best = None
        while self.position < end and (self.position == start or self.ids[-1] not in stops):
            self.ids += self._greedy(self._computed, self.ids[self._computed :], end - self.position, stops)
            self._computed = self.position - 1
        return self.ids[start:]

    def rewind(self, position: int) -> None:
        """Drop the tokens from a position on; 0 drops all.

        Raises:
            UserError: the sequence has not come that far.
        """
        if type(position) is not int or not 0 <= position <= self.position:
            raise usage_error(f"A sequence of {self.position} tokens cannot go back to {position}.")
        if position < self.position:
            del self.ids[position:]
            self._computed = min(self._computed, max(position - 1, 0))  # the last one again, for the logits after it
            self._best = None

    @abstractmethod
    def _compute(self, start: int, tokens: list[int]) -> Tensor:
        """Logits [V] after the last of tokens whose first has the position `start`; the cache holds those before it.

        The cache may hold more, which is to be forgotten.
        """

    def _greedy(self, start: int, tokens: list[int], count: int, stops: Collection[int]) -> list[int]:
        """At least one token, at most `count`, that follow tokens from the position `start` on.

        Stops behind one of `stops`. The cache then holds all tokens but the last.
        """
        return [int(self._compute(start, tokens).argmax())]
