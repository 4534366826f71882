"""Decoder layers one at a time: what enters the first of them, and how each is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

    A layer's call depends on the shape of the token ids alone, so one pass of each shape is enough to know it. In that
    pass only the first layer computes; the others are asked what they are called with.
    """

    model: PreTrainedModel
    found: Structure
    _calls: dict[tuple[int, ...], list[Call]] = field(default_factory=dict)
    _beside: tuple[Any, ...] | None = None  # what layers return behind the states; None where they return no tuple

    @property
    def layers(self) -> list[nn.Module]:
        """In order."""
        return list(self.model.get_submodule(self.found.layers_path).children())

    def knows(self, input_ids: Tensor) -> bool:
        """Whether token ids of this shape have entered."""
        return tuple(input_ids.shape) in self._calls

    @torch.no_grad()
    def entering(self, input_ids: Tensor) -> Tensor:
        """What enters the first layer, [B, T, H], for token ids [B, T] without padding on the left."""
        calls: list[Call] = []
        states: list[Tensor] = []
        outputs: list[Any] = []
        known = self.knows(input_ids)

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            states.append(args[0] if args else kwargs["hidden_states"])
            calls.append(Call(args[1:], rest))
            if known:
                raise _EnoughError

        layers = self.layers
        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        handles.append(layers[0].register_forward_hook(lambda _module, _args, output: outputs.append(output)))
        try:
            with _answering(layers[1:], lambda: outputs[0]), contextlib.suppress(_EnoughError):
                self._run(input_ids)
        finally:
            for handle in handles:
                handle.remove()
        if not known:
            self._calls[tuple(input_ids.shape)] = calls
            self._beside = outputs[0][1:] if isinstance(outputs[0], tuple) else None
        return states[0]

    def through(self, index: int, states: Tensor) -> Tensor:
        """What leaves a layer, counted from 0, for states [B, T, H] of a shape that has entered."""
        return self._calls[tuple(states.shape[:2])][index](self.layers[index], states)

    def final(self, states: Tensor) -> Tensor:
        """What enters the head, [B, T, H], for what leaves the last layer; of a shape that has entered.

        Differentiable with respect to `states`.
        """
        output = states if self._beside is None else (states, *self._beside)
        with _answering(self.layers, lambda: output):
            return self._run(states.new_zeros(states.shape[:2], dtype=torch.int64))

    def _run(self, input_ids: Tensor) -> Tensor:
        """The whole model but its head: what enters that."""
        with final_states(self.model, self.found.head_path) as states:
            self.model(input_ids=input_ids, use_cache=False)
        return states[0]


@contextlib.contextmanager
def _answering(layers: Sequence[nn.Module], answer: Callable[[], Any]) -> Iterator[None]:
    """Let layers return an answer without computing anything."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return answer()

    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
