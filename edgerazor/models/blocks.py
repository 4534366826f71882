"""Decoder layers one at a time: what enters the first of them, and how each is called."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor.models.hidden import final_states
from edgerazor.models.structure import Structure


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with besides hidden states: positions, mask and so on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, states: Tensor) -> Tensor:
        """What leaves the layer, [B, T, H], for what enters it."""
        output = layer(states, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _EnoughError(Exception):
    """Ends a forward pass from which nothing more is wanted."""


@dataclass
class Blocks:
    """The decoder layers of a model, each of them callable alone.

    A layer's call depends on the shape of the token ids alone, so one forward pass of each shape is enough to know it.
    """

    model: PreTrainedModel
    found: Structure
    _calls: dict[tuple[int, ...], list[Call]] = field(default_factory=dict)

    @property
    def layers(self) -> list[nn.Module]:
        """In order."""
        return list(self.model.get_submodule(self.found.layers_path).children())

    @torch.no_grad()
    def entering(self, input_ids: Tensor) -> Tensor:
        """What enters the first layer, [B, T, H], for token ids [B, T] without padding on the left."""
        calls: list[Call] = []
        states: list[Tensor] = []
        known = tuple(input_ids.shape) in self._calls

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            states.append(args[0] if args else kwargs["hidden_states"])
            calls.append(Call(args[1:], rest))
            if known:
                raise _EnoughError

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            with final_states(self.model, self.found.head_path), contextlib.suppress(_EnoughError):
                self.model(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not known:
            self._calls[tuple(input_ids.shape)] = calls
        return states[0]

    def through(self, index: int, states: Tensor) -> Tensor:
        """What leaves a layer, counted from 0, for states [B, T, H] of a shape that has entered."""
        return self._calls[tuple(states.shape[:2])][index](self.layers[index], states)
