"""The definition of what a packed matrix computes, in a few lines of torch. Every faster kernel is compared with it.

The dot product of a row of W and the activations x of one token is a sum over segments, the ranges of columns in which
all weights share a scale `s_w` and all activations a scale `s_x`. A segment contributes
`(s_x * s_w) * sum(q_x * q_w)`, and that sum over small integers is exact in int32. The contributions are added up in
float32, in the order of the columns. That is `linear`. `decoded_linear` equals it up to the rounding of float32 sums:
it is one matrix product of dequantized numbers, which is much faster in PyTorch for many tokens.

Where codes are of a rotated weight, all of this is of the rotated weight and input: `Rotation.rotate` of
`formats/core/rotation.py` comes before `linear`, and `rotate_back` behind `embedding`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from edgerazor.formats import (
    Encoded,
    MatrixSpec,
    decode_matrix,
    fake_quantize_activations,
    fake_quantize_static,
    group_count,
    quantize_activations,
    quantize_static,
)

#: The `activation_bits` of activations that are not quantized.
UNQUANTIZED = 16


def linear(
    x: Tensor,
    encoded: Encoded,
    spec: MatrixSpec,
    bias: Tensor | None = None,
    activation_bits: int = 8,
    activation_group: int = 256,
    activation_scale: float | None = None,
) -> Tensor:
    """`y = W x + bias` by integer sums within groups.

    Args:
        x: any floating dtype [..., in].
        encoded: codes int8 [out, in] and scales float16 [out, groups] of W.
        spec: formats of the rows of W and its group size.
        bias: float32 [out].
        activation_bits: 2 to 8, or 16 for activations that are not quantized (then it is `decoded_linear`).
        activation_group: features of x that share a scale; it need not be the group size of W.
        activation_scale: static scale of all of x, instead of one computed for each group of each token.

    Returns:
        float32 [..., out].

    Raises:
        ValueError: x has another number of features than W has columns.
    """
    _check_features(x, encoded.codes.shape[1])
    if activation_bits == UNQUANTIZED:
        return decoded_linear(x, decode_matrix(encoded, spec), bias, UNQUANTIZED)
    tokens = x.reshape(-1, x.shape[-1])
    if activation_scale is None:
        x_codes, x_scales = quantize_activations(tokens, activation_bits, activation_group)
    else:
        activation_group = x.shape[-1]
        x_codes, x_scales = quantize_static(tokens, activation_bits, activation_scale)
    levels = _levels(encoded.codes, spec)
    y = torch.zeros(x_codes.shape[0], levels.shape[0], dtype=torch.float32, device=x.device)
    for start, stop in _segments(levels.shape[1], spec.group_size, activation_group):
        # float64 holds these sums of integers exactly, and PyTorch has a fast product for it.
        dot = x_codes[:, start:stop].double() @ levels[:, start:stop].double().T  # [tokens, out]
        x_scale = x_scales[:, start // activation_group, None]  # [tokens, 1]
        w_scale = encoded.scales[:, start // spec.group_size].float()  # [out]
        y += dot.float() * (x_scale * w_scale)
    if bias is not None:
        y += bias.float()
    return y.reshape(*x.shape[:-1], y.shape[1])


def decoded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation_bits: int = 8,
    activation_group: int = 256,
    activation_scale: float | None = None,
) -> Tensor:
    """`linear` for dequantized weights, float32 [out, in], as one product of float32 matrices.

    The other arguments, the result and the errors are those of `linear`, up to the rounding of float32 sums.
    """
    _check_features(x, weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        if activation_bits != UNQUANTIZED and activation_scale is not None:
            x = fake_quantize_static(x, activation_bits, activation_scale)
        elif activation_bits != UNQUANTIZED:
            x = fake_quantize_activations(x, activation_bits, activation_group)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.float())


def embedding(ids: Tensor, encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """Rows of an encoded embedding, float32 [..., columns], for ids int64 [...]; dequantizes only these rows."""
    flat = ids.flatten()
    rows = decode_matrix(Encoded(encoded.codes[flat], encoded.scales[flat]), spec.take(flat))
    return rows.reshape(*ids.shape, rows.shape[1])


def _levels(codes: Tensor, spec: MatrixSpec) -> Tensor:
    """Weights in units of their scales, float32 [out, in]: in most formats, these levels are the codes."""
    groups = group_count(codes.shape[1], spec.group_size)
    ones = torch.ones(codes.shape[0], groups, dtype=torch.float16, device=codes.device)
    return decode_matrix(Encoded(codes, ones), spec)


def _segments(columns: int, *group_sizes: int) -> list[tuple[int, int]]:
    """Segments: ranges of columns (start, stop) within which no group of any of the sizes ends."""
    cuts = sorted({0, columns, *(cut for size in group_sizes for cut in range(size, columns, size))})
    return list(pairwise(cuts))


def _check_features(x: Tensor, columns: int) -> None:
    if x.shape[-1] != columns:
        raise ValueError(f"the matrix has {columns} columns, but its input has {x.shape[-1]} features")
