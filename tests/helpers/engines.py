"""A model of transformers behind the interface of the runtime's engines, for tests of what uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgerazor.runtime.scoring import Score, ScoreRequest
from edgerazor.runtime.transformers_model import TransformersModel


class Engine(TransformersModel):
    """A 16-bit model, called `native` or `transformers`; it remembers what it was asked to score."""

    def __init__(self, model: Any, tokenizer: Any, engine: str = "native") -> None:
        self.folder, self.threads, self.note = Path(), 1, None
        self.engine, self.kernel = engine, "none"
        self.model, self.tokenizer = model, tokenizer
        self.config, self.generation_config = model.config, model.generation_config
        self.vocabulary = model.config.vocab_size
        self.max_positions = model.config.max_position_embeddings
        self.score_requests: list[list[ScoreRequest]] = []

    def _score(self, requests: list[ScoreRequest]) -> list[list[Score]]:
        self.score_requests.append(requests)
        return super()._score(requests)
