"""Rotary position embeddings (RoPE): how many positions a model has, and the cosines and sines of each."""

from __future__ import annotations

import importlib
import operator
from typing import Any

import torch
from torch import Tensor

from edgerazor.errors import UserError

#: Where the configuration does not say.
ENDLESS = 1 << 30
#: Kinds of RoPE scaling whose factor is not included in the configuration's `max_position_embeddings`.
_STRETCHED = ("linear", "dynamic", "yarn")
#: Positions of the first table; a later one has at least twice as many as the one before.
_FIRST_POSITIONS = 1024
#: Features of a head, many more than any model has: tables of what a wrong configuration says would fill the memory.
_MOST_FEATURES = 1 << 13


def max_positions(config: Any) -> int:
    """Tokens that a sequence can have, by the configuration of a text model.

    Rotary embeddings that stretch positions by a factor count from the positions before that.

    Raises:
        UserError: the configuration says no such number.
    """
    most: int = getattr(config, "max_position_embeddings", None) or ENDLESS
    rope = getattr(config, "rope_parameters", None) or {}
    try:
        most = operator.index(most)
        if rope.get("rope_type") in _STRETCHED and rope.get("factor"):
            original = rope.get("original_max_position_embeddings") or most
            most = max(most, int(original * rope["factor"]))
    except (TypeError, ValueError, OverflowError):
        most = 0
    if most < 1:
        raise UserError(
            "The max_position_embeddings or rope_parameters of config.json do not say how many positions there are.",
            "Copy or pack the model again.",
        )
    return most


class Rotary:
    """Tables of cosines and sines, computed by the architecture's own rotary embedding in transformers.

    Dynamic embeddings and LongRoPE have other frequencies in calls whose last position is beyond the positions of
    training. The modules keep the frequencies of the longest sequence they have seen; here they depend on the call
    alone.

    Attributes:
        varies_beyond: tokens of the longest sequence whose frequencies do not depend on its length; None: of none.

    Args:
        config: of transformers.
        class_name: of the rotary embedding, in the `modeling_*.py` beside the configuration's class.

    Raises:
        UserError: as `max_positions`.
        ValueError: heads have more features than those of any model.
    """

    def __init__(self, config: Any, class_name: str) -> None:
        modeling = type(config).__module__.replace("configuration_", "modeling_")  # they lie side by side
        self._class = getattr(importlib.import_module(modeling), class_name)
        self._config = config
        self._most = max_positions(config)
        rope = config.rope_parameters
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if max(head_dim, head_dim * rope.get("partial_rotary_factor", 1.0)) > _MOST_FEATURES:
            raise ValueError("a head cannot have so many features")
        self.varies_beyond: int | None = None
        if "dynamic" in rope["rope_type"]:
            self.varies_beyond = config.max_position_embeddings
        elif rope["rope_type"] == "longrope":
            self.varies_beyond = rope["original_max_position_embeddings"]
        self._table = self._compute(0, min(self._most, self.varies_beyond or _FIRST_POSITIONS, _FIRST_POSITIONS))

    @property
    def features(self) -> int:
        """Leading features of a head that are rotated."""
        return 2 * self._table[0].shape[1]

    def varies(self, length: int) -> bool:
        """Whether the frequencies of a sequence of that length depend on its length."""
        return self.varies_beyond is not None and length > self.varies_beyond

    def tables(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [at least length, features / 2] for a call with positions `start` to `length`.

        Rows before `start` may hold anything.
        """
        if self.varies(length):
            cosines, sines = (torch.empty(length, self.features // 2) for _ in range(2))
            cosines[start:], sines[start:] = self._compute(start, length)
            return cosines, sines
        if length > len(self._table[0]):
            rows = min(max(length, 2 * len(self._table[0])), self.varies_beyond or self._most)
            self._table = self._compute(0, rows)
        return self._table

    def _compute(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows of positions [start, end) where a call ends at `end`."""
        with torch.no_grad():
            module = self._class(self._config)
            cosines, sines = module(torch.empty(0), torch.arange(start, end)[None])  # [1, positions, features]
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()
