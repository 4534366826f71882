"""A packed model in transformers: every architecture that transformers has, every setting that a recipe can ask for.

Slow beside the native engine, because Python and torch take longer than the kernels to decode a token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import models, modules, transformers_plugin
from edgerazor.packed import PackedModel, size_table
from edgerazor.runtime.chosen_experts import packed_sizes, unchosen_bytes
from edgerazor.runtime.engine import Model, Session
from edgerazor.runtime.rope import max_positions
from edgerazor.runtime.scoring import Score, ScoreRequest, score_whole


class TransformersModel(Model):
    """A packed model that transformers computes, with packed layers.

    Args:
        folder: packed.
        threads: that torch computes with.
        note: why the native engine does not compute it.

    Raises:
        UserError: not a packed folder, or a damaged one.
    """

    engine = "transformers"

    def __init__(self, folder: Path, threads: int, note: str | None) -> None:
        self.folder, self.threads, self.note = folder, threads, note
        self.model, self.tokenizer = transformers_plugin.load(folder)
        config = self.model.config.get_text_config()
        self.vocabulary = self.model.get_output_embeddings().out_features
        self.max_positions = max_positions(config)
        packed = PackedModel.open(folder)
        classes = {size.kind: size.bytes for size in size_table(packed).classes}
        self.weight_bytes = sum(classes.values())
        sizes, heads = packed_sizes(packed), packed.header.tied.values()
        embeddings = [name for name, matrix in packed.header.matrices.items() if matrix.kind == "embedding"]
        unread = sum(sizes[name] for name in embeddings if name not in heads)  # but for a row of each
        unread += unchosen_bytes(sizes, config)
        self.bytes_per_token = self.weight_bytes - unread
        self.cache_bytes_per_token = 2 * _cached_features(config) * torch.float32.itemsize

    @functools.cached_property
    def kernel(self) -> str:
        return modules.kernels_of(self.model)

    def session(self) -> TransformersSession:
        return TransformersSession(self)

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """The output of transformers' model for tokens int64 [B, T]."""
        with _threads(self.threads), torch.inference_mode():
            return self.model(input_ids=tokens, **options)

    def _logits(self, tokens: Tensor, last: int) -> Tensor:
        logits = self.forward(tokens, use_cache=False, logits_to_keep=last).logits
        return logits[:, -last:].float()  # some models keep all

    def _score(self, requests: list[ScoreRequest]) -> list[list[Score]]:
        return score_whole(requests, self._logits)


class TransformersSession(Session):
    """A sequence and its cache in transformers."""

    model: TransformersModel

    def __init__(self, model: TransformersModel) -> None:
        super().__init__(model)
        self._cache: Any = None
        self._cached = 0
        self._deltas: Any = None

    def _compute(self, start: int, tokens: list[int]) -> Tensor:
        self._forget(start)
        if any(token >= models.FIRST for token in tokens):  # families place pictures in whole sequences only
            self._cache, self._cached = None, 0
        missing = self.ids[self._cached : start]
        model = self.model.model
        options = models.with_cache(model, self._cache)
        with models.own_positions(model, self._deltas) as deltas:
            out = self.model.forward(torch.tensor([[*missing, *tokens]]), logits_to_keep=1, **options)
        self._deltas = deltas[-1]
        self._cache, self._cached = out[models.cache_name(model)], start + len(tokens)
        return out.logits[0, -1].float()

    def _forget(self, start: int) -> None:
        """Crop the cache to the tokens before `start`; drop all of it where it cannot be cropped."""
        try:
            if self._cached > start:
                self._cache.crop(start - self._cached)
                self._cached = start
        except (RuntimeError, ValueError, AttributeError):  # older tokens left a sliding window, a state cannot go back
            self._cache, self._cached = None, 0


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Lets torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cached_features(config: Any) -> int:
    """Features of the keys of a token in all layers."""
    layers = range(config.num_hidden_layers)
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(len(layers) * heads * width)
    own = [config.per_layer_config[layer] for layer in layers if modes[layer] != "reuse"]  # heads of several widths
    return int(sum(layer.num_key_value_heads * layer.head_dim for layer in own))
