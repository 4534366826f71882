"""Rotary position embeddings (RoPE): how many positions a model has, and the cosines and sines of each."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgerazor.errors import UserError
from edgerazor.families import head_width

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
    try:
        most = unstretched = operator.index(most)
        for rope in _parameters(config):
            if rope.get("rope_type") in _STRETCHED and rope.get("factor"):
                original = rope.get("original_max_position_embeddings") or unstretched
                most = max(most, int(original * rope["factor"]))
    except (TypeError, ValueError, OverflowError):
        most = 0
    if most < 1:
        raise UserError(
            "The max_position_embeddings or rope_parameters of config.json do not say how many positions there are.",
            "Copy or pack the model again.",
        )
    return most


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary positions, of each type of layers where these have their own."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = [parameters for parameters in rope.values() if isinstance(parameters, dict)]
    return by_type or [rope]


class Rotary:
    """Tables of cosines and sines, computed by the architecture's own rotary embedding in transformers.

    Dynamic embeddings and LongRoPE have other frequencies in calls whose last position is beyond the positions of
    training. The modules keep the frequencies of the longest sequence they have seen; here they depend on the call
    alone.

    Attributes:
        names: of the tables, keys of the configuration's `rope_parameters`; one empty name where all layers have the
            same positions.
        varies_beyond: tokens of the longest sequence whose frequencies do not depend on its length; None: of none.

    Args:
        config: of transformers.
        class_name: of the rotary embedding, in the `modeling_*.py` beside the configuration's class.
        name_of_layer: the name of a layer's table; None: there is one table.
        query_scaling: beta and length of factors of queries, 1 + beta * log(1 + floor(position / length)), or None.
        head_widths: of all layers; None: all are those of the configuration.

    Raises:
        UserError: as `max_positions`.
        ValueError: heads have more features than those of any model.
    """

    def __init__(
        self,
        config: Any,
        class_name: str,
        name_of_layer: Callable[[Any, int], str] | None = None,
        query_scaling: tuple[float, int] | None = None,
        head_widths: Sequence[int] | None = None,
    ) -> None:
        modeling = type(config).__module__.replace("configuration_", "modeling_")  # they lie side by side
        self._class = getattr(importlib.import_module(modeling), class_name)
        self._config = config
        self._most = max_positions(config)
        self._query_scaling = query_scaling
        layers = range(config.num_hidden_layers)
        self._name_of = [name_of_layer(config, layer) if name_of_layer else "" for layer in layers]
        rope = config.rope_parameters
        self.names = sorted({name for name in self._name_of if not name or rope.get(name)})
        head_dim = max(head_widths or [head_width(config)])
        self.varies_beyond: int | None = None
        for parameters in _parameters(config):
            if max(head_dim, head_dim * parameters.get("partial_rotary_factor", 1.0)) > _MOST_FEATURES:
                raise ValueError("a head cannot have so many features")
            if "dynamic" in parameters["rope_type"] and not parameters.get("alpha"):  # Hunyuan's alpha fixes them
                self.varies_beyond = config.max_position_embeddings
            elif parameters["rope_type"] == "longrope":
                self.varies_beyond = parameters["original_max_position_embeddings"]
        self._features: dict[str, int] = {}
        self._table = self._compute(0, min(self._most, self.varies_beyond or _FIRST_POSITIONS, _FIRST_POSITIONS))

    @property
    def features(self) -> int:
        """Rotated features that each of the tables has room for."""
        return max(self._features.values())

    def features_of(self, layer: int) -> int:
        """Leading features of a head that a layer rotates."""
        return self._features[self.names[self.table_of(layer)]]

    def table_of(self, layer: int) -> int:
        """The number of a layer's table; 0 where it has no positions."""
        name = self._name_of[layer]
        return self.names.index(name) if name in self.names else 0

    def varies(self, length: int) -> bool:
        """Whether the frequencies of a sequence of that length depend on its length."""
        return self.varies_beyond is not None and length > self.varies_beyond

    def tables(self, start: int, length: int) -> tuple[Tensor, ...]:
        """Cosines and sines float32 [at least length, tables * features / 2], padded with zeros, for a call with
        positions `start` to `length`, and the factors of queries [at least length], where there are some: what
        `Decoder.set_rope` gets.

        Rows before `start` may hold anything.
        """
        if self.varies(length):
            parts = self._compute(start, length)
            whole = tuple(torch.empty(length, *part.shape[1:]) for part in parts)
            for rows, part in zip(whole, parts, strict=True):
                rows[start:] = part
            return whole
        if length > len(self._table[0]):
            size = min(max(length, 2 * len(self._table[0])), self.varies_beyond or self._most)
            self._table = self._compute(0, size)
        return self._table

    def _compute(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Rows of positions [start, end) where a call ends at `end`."""
        return self.tables_at(torch.arange(start, end)[None])

    def tables_at(self, ids: Tensor) -> tuple[Tensor, ...]:
        """As `tables`, for positions int64 [1, T], or [3, 1, T] in families whose positions have three dimensions."""
        positions = ids.reshape(-1, ids.shape[-1])[0]
        with torch.no_grad():
            module = self._class(self._config)
            tables = [
                module(torch.empty(0), ids, *([name] if name else []))  # [1, positions, features] each
                for name in self.names
            ]
        self._features = {name: table[0].shape[-1] for name, table in zip(self.names, tables, strict=True)}
        joined = (torch.cat([self._half(table[part][0]) for table in tables], dim=1) for part in (0, 1))
        if self._query_scaling is None:
            return tuple(joined)
        beta, length = self._query_scaling
        return (*joined, 1 + beta * torch.log(1 + torch.floor(positions / length)))

    def _half(self, table: Tensor) -> Tensor:
        """The first half of the columns, which are those of the second, as wide as those of the widest table."""
        half = table.shape[-1] // 2
        return torch.nn.functional.pad(table[:, :half].float(), (0, self.features // 2 - half))
