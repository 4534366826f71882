"""Quantized inputs of linear layers, computed once for the layers that share an input.

The query, key and value projections read one tensor, and so do the gate and up projections of an MLP.
`SharedActivations` remembers the last tensor that it quantized and returns the stored result when it comes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from edgerazor import formats
from edgerazor.formats import Rotation
from edgerazor.modules.attention import UNIMPORTANT_BITS

#: A scale or zero point of inputs: a parameter where it is trained, a number where it is stored, else None.
InputNumber: TypeAlias = nn.Parameter | float | None
#: Gives bool [batch, tokens]: which tokens of the current forward pass are important, that is, get all bits.
TokenMask: TypeAlias = Callable[[], Tensor]


class InputScales(NamedTuple):
    """The stored or trained scales of a linear layer's input, in the order of `formats.OF_INPUTS`.

    Attributes:
        scale: the scale; None: each group of each token has a scale of its own (dynamic quantization).
        low_scale: the scale of unimportant tokens.
        zero_point: the zero point that goes with `scale`; None for symmetric codes.
        low_zero_point: the zero point that goes with `low_scale`.
    """

    scale: InputNumber = None
    low_scale: InputNumber = None
    zero_point: InputNumber = None
    low_zero_point: InputNumber = None


#: No stored scales.
DYNAMIC = InputScales()


class SharedActivations:
    """Quantizes the inputs of linear layers, once for layers that share an input.

    Args:
        bits: bits of the activations of important tokens; 16 leaves them as they are.
        group_size: number of consecutive activations of a token that share a scale, where scales are dynamic.
    """

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self._input: weakref.ref[Tensor] | None = None
        self._state: tuple[Any, ...] | None = None
        self._output: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        scales: InputScales = DYNAMIC,
        important: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Rotate and quantize activations as the packed model does.

        The gradient is the straight-through one, or with a stored scale the one of `formats.fake_quantize_static`.

        Args:
            x: floating [..., features].
            scales: the stored scales of this input.
            important: bool [...], which tokens get all bits; None: all of them.
            rotation: of the weights that x is multiplied with; x is rotated likewise before it is quantized.

        Returns:
            [..., features] in the dtype that matrix products are computed in.
        """
        if x.is_inference():  # such a tensor has no version by which a change could be noticed
            return self._quantize(x, scales, important, rotation)
        state = (torch.is_grad_enabled(), x._version, id(important), id(rotation), *map(_version, scales))
        if self._input is not None and self._input() is x and self._state == state and self._output is not None:
            return self._output
        output = self._quantize(x, scales, important, rotation)
        # This must come first: the last output may be all that keeps its own input alive, whose end calls `forget`.
        self.forget()
        if output is not x:  # nothing was rounded: a stored result would only hold memory
            self._input, self._state, self._output = weakref.ref(x, self.forget), state, output
        return output

    def _quantize(self, x: Tensor, scales: InputScales, important: Tensor | None, rotation: Rotation | None) -> Tensor:
        dtype = matmul_dtype(x)
        x = x if rotation is None else rotation.rotate(x)
        quantized = x if self.bits == 16 else self._round(x, self.bits, scales.scale, scales.zero_point)
        if important is not None:
            low = self._round(x, UNIMPORTANT_BITS, scales.low_scale, scales.low_zero_point)
            quantized = torch.where(important.unsqueeze(-1), quantized, low)
        return quantized.to(dtype)

    def _round(self, x: Tensor, bits: int, scale: InputNumber, zero_point: InputNumber) -> Tensor:
        if scale is None:
            return formats.fake_quantize_activations(x, bits, self.group_size)
        return formats.fake_quantize_static(x, bits, scale, zero_point)

    def forget(self, _dead: object = None) -> None:
        """Release the stored activations. The weak reference calls this when the input is gone."""
        self._input = self._output = None


def _version(number: InputNumber) -> object:
    """A value that changes when a scale or zero point does."""
    return (id(number), number._version) if isinstance(number, Tensor) else number


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products with x are computed in: autocast's choice where autocast is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
