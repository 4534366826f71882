"""Dynamic activation quantization, and the KV cache: scales are computed while the model runs.

An activation vector is cut into groups like a row of weights; each group of each token gets its own scale at the moment
it is computed, `s = max|x| / (2^(b-1)-1)`, and is rounded to int8, so that a kernel multiplies small integers. The
scale of an activation is never stored and stays float32; the scale of a cached key or value is stored, and so rounded
to fp16 first. Source: EdgeRazor, arXiv 2605.04062 (A8-KV8: dynamic, symmetric, per token and group).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.formats.core.base import LARGEST_SCALE, straight_through

#: Smallest normal float32. A group without a larger scale counts as zero, on every machine and flushing mode alike.
TINY = torch.finfo(torch.float32).tiny


def fake_quantize_activations(x: Tensor, bits: int = 8, group_size: int = 256) -> Tensor:
    """Activations as the packed model computes with them; the gradient passes unchanged.

    Args:
        x: any floating dtype [..., features].
        bits: 2 to 8.
        group_size: consecutive features that share a scale; the last group may be shorter.

    Returns:
        code times scale, computed in float32, in the dtype and shape of `x`. A group with a value that is not finite
        becomes NaN.

    Raises:
        ValueError: the bits are not 2 to 8.
    """
    return straight_through(x, lambda x: _quantize_dequantize(x, bits, group_size, stored=False))


def fake_quantize_kv(x: Tensor, bits: int = 8) -> Tensor:
    """Keys or values [..., head_dim] as the KV cache holds them: one group per head vector, its scale rounded to fp16.

    Dtype, shape and gradient are as for `fake_quantize_activations`.
    """
    return straight_through(x, lambda x: _quantize_dequantize(x, bits, x.shape[-1], stored=True))


def fake_quantize_probabilities(p: Tensor, bits: int = 8) -> Tensor:
    """Attention probabilities [..., keys] in unsigned codes, 0 to 2^bits-1, with one scale for each token and head.

    Dtype, shape and gradient are as for `fake_quantize_activations`.

    Raises:
        ValueError: the bits are not 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"probabilities are quantized to 2 to 8 bits, not {bits}")

    def quantize_dequantize(p: Tensor) -> Tensor:
        exact = p.float()
        scales = exact.amax(dim=-1, keepdim=True).div_(2**bits - 1).clamp_(min=TINY)  # [..., 1]
        return (exact / scales).round_().mul_(scales).to(p.dtype)

    return straight_through(p, quantize_dequantize)


def quantize_activations(x: Tensor, bits: int = 8, group_size: int = 256) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., features] and scales float32 [..., groups]: the same numbers as `fake_quantize_activations`.

    Raises:
        ValueError: a value is not finite (integers cannot say so), or the bits are not 2 to 8.
    """
    if not torch.isfinite(x).all():
        raise ValueError("an activation is not finite")
    codes, scales = zip(*(_quantize(group, bits, stored=False) for group in _grouped(x, group_size)), strict=True)
    return (
        torch.cat([code.flatten(-2) for code in codes], dim=-1).to(torch.int8),
        torch.cat([scale.squeeze(-1) for scale in scales], dim=-1),
    )


def _quantize_dequantize(x: Tensor, bits: int, group_size: int, *, stored: bool) -> Tensor:
    """`x` rounded, in its dtype and shape; `stored`: as `_quantize`."""
    decoded = []
    for group in _grouped(x, group_size):
        codes, scales = _quantize(group, bits, stored=stored)
        decoded.append(codes.mul_(scales).flatten(-2))
    whole = decoded[0] if len(decoded) == 1 else torch.cat(decoded, dim=-1)
    return whole.to(x.dtype)


def _grouped(x: Tensor, group_size: int) -> list[Tensor]:
    """Views or float32 copies of x [..., features]: whole groups [..., groups, group], then the shorter one."""
    features = x.shape[-1]
    group = min(group_size, features)
    full = features - features % group
    parts = [x[..., :full].unflatten(-1, (-1, group))]
    if full < features:
        parts.append(x[..., full:].unsqueeze(-2))
    return parts


def _quantize(groups: Tensor, bits: int, *, stored: bool) -> tuple[Tensor, Tensor]:
    """Codes (a new float32 tensor) and scales float32 [..., groups, 1] of groups [..., groups, group].

    `stored`: the scales are rounded to fp16, as the KV cache stores them.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activations are quantized to 2 to 8 bits, not {bits}")
    maximum = 2 ** (bits - 1) - 1
    groups = groups.float()
    scales = groups.abs().amax(dim=-1, keepdim=True).div_(maximum)
    if stored:
        scales = scales.clamp_(max=LARGEST_SCALE).half().float()
    scales = scales.masked_fill_(scales < TINY, 0.0)
    codes = groups / scales.masked_fill(scales == 0, torch.inf)
    codes.round_()
    # With the exact scale, |x| / s is within rounding of the largest code at most; with a rounded one it may be above.
    return (codes.clamp_(-maximum, maximum) if stored else codes), scales
