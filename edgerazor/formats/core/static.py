"""Static activation quantization: one stored scale for each linear layer's input, calibrated or trained.

A dynamic scale (`activations.py`) needs the largest value of every group of every token before anything can be
rounded. A static one needs nothing at run time, but must serve all tokens: if it is too small, the largest values are
clipped; if it is too large, the small ones vanish. `calibrated_scale` takes the scale with the least squared error on
calibration text. Trained, it is LSQ's step (Esser et al., arXiv 1902.08153): with `r = x / s` and codes from `-Qp` to
`Qp`,

    d x' / d x = 1 where -Qp < r < Qp, else 0
    d x' / d s = (round(r) - r where -Qp < r < Qp, else sign(r)*Qp) / sqrt(features*Qp)

The scale is a float32 number in training and in the packed file.

An input that is not symmetric may have a zero point z, too, a whole number from `-Qp` to `Qp`, so that 0 stays exact:
the code is `q = round(x / s + z)` within `-Qp` to `Qp`, and `x' = s*(q - z)`. Trained (EdgeQAT, arXiv 2402.10787, the
quantizer of its code), z is a float that is rounded where it is used, with

    d x' / d s = (q - z - r where -Qp < r + z < Qp, else q - z) / sqrt(features*Qp)
    d x' / d z = (0 where -Qp < r + z < Qp, else -s) / sqrt(features*Qp)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Names, after the layer's path, of the scale of a linear layer's input, and of the one for tokens with fewer bits.
INPUT_SCALE, LOW_INPUT_SCALE = "input_scale", "low_input_scale"
#: Names of their zero points.
INPUT_ZERO_POINT, LOW_INPUT_ZERO_POINT = "input_zero_point", "low_input_zero_point"
#: All names under which something is stored of the inputs of a linear layer.
OF_INPUTS = (INPUT_SCALE, LOW_INPUT_SCALE, INPUT_ZERO_POINT, LOW_INPUT_ZERO_POINT)
#: The smallest scale: a trained one never reaches zero.
SMALLEST = 2.0**-24
#: Magnitudes are counted in bins of equal ratio, BINS_PER_OCTAVE to a factor of two, from 2^FIRST to 2^LAST.
FIRST, LAST, BINS_PER_OCTAVE = -24, 24, 16


def fake_quantize_static(
    x: Tensor, bits: int, scale: Tensor | float, zero_point: Tensor | float | None = None
) -> Tensor:
    """Activations as the packed model computes with them, with the gradients above.

    Args:
        x: any floating dtype [..., features].
        bits: 2 to 8.
        scale: float32 [] or a number; below `SMALLEST` it counts as that.
        zero_point: float32 [] or a number, see `whole_zero_point`; None for symmetric codes.

    Returns:
        code times scale, computed in float32, in the dtype and shape of `x`; NaN stays NaN.

    Raises:
        ValueError: the bits are not 2 to 8.
    """
    largest, step = _largest_code(bits), _number(scale, x)
    if zero_point is None:
        symmetric: Tensor = _SymmetricStep.apply(x, step, largest)
        return symmetric
    quantized: Tensor = _AffineStep.apply(x, step, _number(zero_point, x), largest)
    return quantized


def whole_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """The zero point that is computed with for a trained one, float []: the nearest whole number from `-Qp` to `Qp`."""
    largest = _largest_code(bits)
    return zero_point.detach().round().clamp_(-largest, largest)


def _number(value: Tensor | float, x: Tensor) -> Tensor:
    """A number as float32 [] on the device of x."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=x.device)


def quantize_static(x: Tensor, bits: int, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Codes int8 [tokens, features] and scales float32 [tokens, 1] of x [tokens, features].

    Raises:
        ValueError: a value is not finite (integers cannot say so), or the bits are not 2 to 8.
    """
    if not torch.isfinite(x).all():
        raise ValueError("an activation is not finite")
    step = _positive(_number(scale, x))
    return _codes(x, step, _largest_code(bits)).to(torch.int8), step.expand(len(x), 1)


def _largest_code(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"activations are quantized to 2 to 8 bits, not {bits}")
    return 2 ** (bits - 1) - 1


def _positive(scale: Tensor) -> Tensor:
    return scale.detach().clamp(min=SMALLEST)


def _codes(x: Tensor, step: Tensor, largest: int) -> Tensor:
    """Codes as a new float tensor."""
    return (x.to(step.dtype) / step).round_().clamp_(-largest, largest)


class _SymmetricStep(torch.autograd.Function):
    """Symmetric codes times the step, with LSQ's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, largest: int) -> Tensor:
        ctx.largest = largest
        ctx.save_for_backward(x, scale)
        step = _positive(scale)
        return _codes(x, step, largest).mul_(step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        ratio = x.to(scale.dtype) / _positive(scale)
        inside = ratio.abs() < ctx.largest
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None, None
        slope = ratio.round().clamp_(-ctx.largest, ctx.largest).sub_(ratio * inside)
        to_scale = (gradient.to(scale.dtype) * slope).sum() / (x.shape[-1] * ctx.largest) ** 0.5
        return to_x, to_scale, None


class _AffineStep(torch.autograd.Function):
    """`_SymmetricStep` with a zero point: the codes of `x + s*z`, so that packed models use the same kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> Tensor:
        ctx.largest = largest
        ctx.save_for_backward(x, scale, zero_point)
        step, zero = _positive(scale), zero_point.detach().round().clamp_(-largest, largest)
        return _codes(x.to(step.dtype) + step * zero, step, largest).sub_(zero).mul_(step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, scale, zero_point = ctx.saved_tensors
        largest, step = ctx.largest, _positive(scale)
        zero = zero_point.round().clamp_(-largest, largest)
        shifted = (x.to(step.dtype) + step * zero) / step
        inside = shifted.abs() < largest
        upstream, factor = gradient.to(scale.dtype), (x.shape[-1] * largest) ** -0.5
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        slope = shifted.round().clamp_(-largest, largest).sub_(zero).sub_((shifted - zero) * inside)
        to_scale = (upstream * slope).sum() * factor if ctx.needs_input_grad[1] else None
        to_zero = (upstream * ~inside).sum() * -step * factor if ctx.needs_input_grad[2] else None
        return to_x, to_scale, to_zero, None


# Calibration ------------------------------------------------------------------------------------------------------


def magnitude_counts(x: Tensor) -> Tensor:
    """Histogram of the magnitudes of `x` (any floating dtype and shape): int64 [bins], which can be added up."""
    bins = (LAST - FIRST) * BINS_PER_OCTAVE
    bin_index = x.detach().float().abs().flatten().log2().sub_(FIRST).mul_(BINS_PER_OCTAVE)  # minus infinity for zero
    return torch.bincount(bin_index.clamp_(0, bins - 1).long(), minlength=bins)


def calibrated_scale(counts: Tensor, bits: int) -> float:
    """The scale with the least squared error on values whose histogram `magnitude_counts` made.

    A value beyond the largest code has the error that clipping makes, one below half a step its own size, and any other
    `s / sqrt(12)` in the mean square. The candidates put the largest code on the upper end of a bin.

    Raises:
        ValueError: the bits are not 2 to 8.
    """
    largest = _largest_code(bits)
    edges = torch.arange(FIRST * BINS_PER_OCTAVE, LAST * BINS_PER_OCTAVE + 1, dtype=torch.float64)
    edges = (edges / BINS_PER_OCTAVE).exp2()
    values, steps = (edges[1:] * edges[:-1]).sqrt(), edges[1:, None] / largest  # [bins], [candidates, 1]
    error = (steps.square() / 12).expand(-1, len(values))
    error = torch.where(values < steps / 2, values.square(), error)
    error = torch.where(values > steps * largest, (values - steps * largest).square(), error)
    best = (error @ counts.cpu().double()).argmin()
    return max(float(steps[best, 0].float()), SMALLEST)
