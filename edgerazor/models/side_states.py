"""What flows between decoder layers beside hidden states: Gemma 4's inputs of single layers, and keys and values that
later layers share.

So that layers can still be called one at a time, and gradients flow through all of it, these side states are appended
to the hidden states of a token, [B, T, H + side]: first the inputs of all layers that are still to come, then the keys
and values that one of them uses. Other models have none, and nothing is appended.

Source: `Gemma4TextModel.forward` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedHeads:
    """Keys, or values, that later layers use.

    Attributes:
        kind: of the layers that share them, one of the configuration's `layer_types`.
        heads, width: of keys and of values.
    """

    kind: str
    heads: int
    width: int

    @property
    def features(self) -> int:
        """Features of keys and values of a token."""
        return 2 * self.heads * self.width


@dataclass(frozen=True)
class SideStates:
    """The side states of a model.

    Attributes:
        hidden: features of a hidden state.
        inputs: features of the input of a single layer.
        shared: for each layer, and for the end, what is shared where it begins.
    """

    hidden: int
    inputs: int
    shared: tuple[tuple[SharedHeads, ...], ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.shared) - 1

    def begin(self, states: Tensor, layer_inputs: list[Tensor]) -> Tensor:
        """Inputs of the first layer, [B, T, H + side], from hidden states and the inputs [B, T, inputs] of layers."""
        own = layer_inputs if self.inputs else []
        return torch.cat([states, *(x.to(states.dtype) for x in own)], dim=-1)

    def split(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Hidden states [B, T, H], the input of the layer [B, T, inputs], and keys and values [B, heads, T, width] by
        kind of layer, from the inputs of a layer."""
        ahead, begin, shared = self.hidden + self.inputs, self.hidden + self.inputs * (self.layers - layer), {}
        for of_kind in self.shared[layer]:
            heads = states[..., begin : begin + of_kind.features].unflatten(-1, (2, of_kind.heads, of_kind.width))
            key, value = heads.permute(2, 0, 3, 1, 4)  # [2, B, heads, T, width]
            shared[of_kind.kind] = (key, value)
            begin += of_kind.features
        return states[..., : self.hidden], states[..., self.hidden : ahead], shared

    def join(self, layer: int, states: Tensor, output: Tensor, shared: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Inputs of the next layer, from those of this one, its output, and what is shared behind it."""
        parts = [output, states[..., self.hidden + self.inputs : self.hidden + self.inputs * (self.layers - layer)]]
        for of_kind in self.shared[layer + 1]:
            heads = torch.stack(shared[of_kind.kind])  # [2, B, heads, T, width]
            parts.append(heads.permute(1, 3, 0, 2, 4).flatten(2).to(output.dtype))
        return torch.cat(parts, dim=-1)


def side_states(config: Any) -> SideStates | None:
    """The side states of a text model's configuration; None where hidden states are all that flows."""
    inputs, modes = getattr(config, "hidden_size_per_layer_input", None) or 0, getattr(config, "kv_sharing_modes", [])
    if not modes or not (inputs or "reuse" in modes):
        return None
    kinds, count = config.layer_types, config.num_hidden_layers
    shared: list[tuple[SharedHeads, ...]] = []
    stored: dict[str, SharedHeads] = {}
    for layer in range(count + 1):
        needed = {kinds[later] for later in range(layer, count) if modes[later] == "reuse"}
        shared.append(tuple(stored[kind] for kind in sorted(stored) if kind in needed))
        if layer < count and modes[layer] == "store":
            own = config.per_layer_config[layer]
            stored[kinds[layer]] = SharedHeads(kinds[layer], own.num_key_value_heads, own.head_dim)
    return SideStates(config.hidden_size, inputs, tuple(shared))
