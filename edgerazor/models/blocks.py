"""Decoder layers one at a time: the inputs of the first of them, and how each is called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor.errors import UserError
from edgerazor.models import pictures
from edgerazor.models.hidden_states import final_states
from edgerazor.models.side_states import SideStates, side_states
from edgerazor.models.structure import Structure


@dataclass(frozen=True)
class Call:
    """The arguments of a decoder layer besides hidden states: positions, mask and so on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None  # [B, T, H], to the output

    def __call__(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Output states of the layer, [B, T, H], for its input states."""
        output = layer(states, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result if self.added is None else result + self.added.to(result.dtype)


def _key(input_ids: Tensor) -> Hashable:
    """What the arguments of layers depend on."""
    shape = tuple(input_ids.shape)
    return (shape, input_ids.cpu().numpy().tobytes()) if pictures.has_pictures(input_ids) else shape


class _StopForwardError(Exception):
    """Ends a forward pass whose remaining layers need not be computed."""


@dataclass
class Blocks:
    """The decoder layers of a model, each of them callable alone.

    States are [B, T, H], and wider where more flows between layers (`side_states.py`): `hidden` gives their beginning.

    The arguments of a layer depend on the shape of the token ids alone, so one pass of each shape is enough to capture
    them. In that pass only the first layer computes; the others only record their arguments. Where there are tokens of
    pictures (`pictures.py`), positions and masks depend on these, too, and features may be added behind a layer: such
    token ids are captured for themselves, and the layers are called with them.
    """

    model: PreTrainedModel
    structure: Structure
    _calls: dict[Hashable, list[Call]] = field(default_factory=dict)
    _other_outputs: tuple[Any, ...] | None = None  # of a layer, behind the states; None where it returns no tuple

    @functools.cached_property
    def side(self) -> SideStates | None:
        """What flows between the layers beside hidden states."""
        return side_states(self.model.config.get_text_config())

    def hidden(self, states: Tensor) -> Tensor:
        """Hidden states [B, T, H] alone."""
        return states if self.side is None else states[..., : self.side.hidden]

    def beside(self, states: Tensor) -> Tensor:
        """What flows beside hidden states."""
        return states[..., self.side.hidden :] if self.side else states[..., states.shape[-1] :]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers in order."""
        return list(self.model.get_submodule(self.structure.layers_path).children())

    def knows(self, input_ids: Tensor) -> bool:
        """Whether the arguments of the layers are known for token ids like these."""
        return _key(input_ids) in self._calls

    @torch.no_grad()
    def inputs(self, input_ids: Tensor) -> Tensor:
        """Input states of the first layer, [B, T, H], for token ids [B, T] without padding on the left.

        From here on, layers can be called for states of this shape.
        """
        calls: list[Call] = []
        states: list[Tensor] = []
        known = self.knows(input_ids)

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            states.append(args[0] if args else kwargs["hidden_states"])
            calls.append(Call(args[1:], others))
            if known and self.side is None:
                raise _StopForwardError

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            with self.first_layer_only() as outputs, contextlib.suppress(_StopForwardError):
                self._forward_to_head(input_ids)
        finally:
            for handle in handles:
                handle.remove()
        if not known:
            self._other_outputs = outputs[0][1:] if isinstance(outputs[0], tuple) else None
            if pictures.added_between_layers(pictures.PICTURES, input_ids):
                calls = self._with_additions(calls, input_ids, states[0])
            self._calls[_key(input_ids)] = calls
        return states[0] if self.side is None else self.side.begin(states[0], [call.args[0] for call in calls])

    @contextlib.contextmanager
    def first_layer_only(self) -> Iterator[list[Any]]:
        """Let the first layer compute alone inside the block, the others return its output; yields its outputs."""
        outputs: list[Any] = []
        layers = self.layers
        handle = layers[0].register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            with _stubbed(layers[1:], lambda: outputs[-1]):
                yield outputs
        finally:
            handle.remove()

    def _with_additions(self, calls: list[Call], input_ids: Tensor, states: Tensor) -> list[Call]:
        """The calls of layers with what the model adds to their outputs: what is left of outputs that are 0.

        Raises:
            UserError: something is added behind the last layer, where it cannot be seen.
        """
        entered: list[Tensor] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        zeros = torch.zeros_like(states)
        output = zeros if self._other_outputs is None else (zeros, *self._other_outputs)
        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            with _stubbed(self.layers, lambda: output):
                self._forward_to_head(input_ids)
        finally:
            for handle in handles:
                handle.remove()
        mask = pictures.picture_mask(input_ids)
        levels = pictures.PICTURES.gather(input_ids[mask].cpu()).deep
        if levels is not None and len(levels) >= len(calls):
            raise UserError(
                f"{type(self.model).__name__} adds features of pictures behind all of its {len(calls)} layers, which "
                "is not understood."
            )
        added = [state if bool(state.any()) else None for state in entered[1:]]
        return [replace(call, added=extra) for call, extra in zip(calls, [*added, None], strict=True)]

    def forward_layer(self, index: int, states: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Output states of a layer, counted from 0, for input states [B, T, H] of a shape that `inputs` has seen.

        Args:
            index: of the layer.
            states: its inputs.
            input_ids: [B, T]; needed where there are pictures among them.
        """
        key = tuple(states.shape[:2]) if input_ids is None else _key(input_ids)
        call, layer = self._calls[key][index], self.layers[index]
        if self.side is None:
            return call(layer, states)
        hidden, layer_input, shared = self.side.split(index, states)
        inputs = layer_input if self.side.inputs else None
        own = Call((inputs, *call.args[1:]), {**call.kwargs, "shared_kv_states": shared})
        return self.side.join(index, states, own(layer, hidden), shared)

    def final(self, states: Tensor) -> Tensor:
        """Input of the head, [B, T, H], for output states of the last layer, of a shape that `inputs` has seen.

        Differentiable with respect to `states`.
        """
        states = self.hidden(states)
        output = states if self._other_outputs is None else (states, *self._other_outputs)
        embedding: Any = self.model.get_input_embeddings()
        with _stubbed(self.layers, lambda: output), _stubbed([embedding], lambda: torch.zeros_like(states)):
            return self._forward_to_head(states.new_zeros(states.shape[:2], dtype=torch.int64))

    def _forward_to_head(self, input_ids: Tensor) -> Tensor:
        """The whole model but its head: the input of the head."""
        with final_states(self.model, self.structure.head_path) as states:
            self.model(input_ids=input_ids, use_cache=False)
        return states[0]


@contextlib.contextmanager
def _stubbed(layers: Sequence[nn.Module], output: Callable[[], Any]) -> Iterator[None]:
    """Let layers return an output without computing anything."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output()

    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
