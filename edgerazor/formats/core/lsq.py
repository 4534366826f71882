"""Learned step: the scale of a group is trained like a weight instead of following from the group's weights.

Forward, the codes are those of the format with the scale `s` (rounded to fp16 first, as everywhere) and may be any that
can be stored, `lo` to `hi`. Backward, with `r = w / s` (Esser et al., "Learned step size quantization", arXiv
1902.08153, section 2.1),

    d w' / d w = 1 where lo < r < hi, else 0
    d w' / d s = (level(r) - r where lo < r < hi, else level(r)) / sqrt(N*Qp)

where `N` is the number of weights of the group and `Qp` the largest level: without the factor the few scales would get
gradients as large as those of all their weights together. The published start is `s = 2*mean|w| / sqrt(Qp)`;
ours is the scale of least error.

Where the codes are fixed and only scales are trained, `w' = s * level` is a product like any other, and so is its
gradient: `d w' / d s = level`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgerazor.formats.core.base import LARGEST_SCALE, Encoded, Format, _blocks, _grouping, group_count
from edgerazor.formats.core.matrix import (
    MatrixSpec,
    _merge,
    _select,
    decode_matrix,
    encode_matrix,
    join_strips,
    quantize_dequantize,
)

#: The smallest scale that fp16 can hold: a learned scale never reaches zero.
SMALLEST = 2.0**-24
#: Floats that rounding may put between a weight and the interval of its code, with room to spare.
NUDGES = 4


def initial_scales(w: Tensor, spec: MatrixSpec) -> Tensor:
    """Where training begins, float32 [rows, groups], positive, for w [rows, cols].

    The scales of least squared error, or the published start, `2*mean|w| / sqrt(Qp)`, where the specification says so.
    """
    if not spec.published:
        return stored_scales(encode_matrix(w, spec).scales).float()
    if spec.block_formats is not None:
        strips = spec.strips(w.shape)
        return join_strips(strips, [initial_scales(strip.of(w), strip.spec) for strip in strips])
    spec.check_shape(w.shape)
    parts = []
    for number_format, rows in spec.parts:
        chosen, group, full = _grouping(_select(w.detach(), rows), spec.group_size)
        means = torch.empty(len(chosen), group_count(w.shape[1], group), dtype=torch.float64, device=w.device)
        for height, cols, groups in _blocks(chosen, group, full):
            grouped = chosen[height, cols].unflatten(1, (groups.stop - groups.start, -1))
            means[height, groups] = grouped.abs().mean(dim=2, dtype=torch.float64)
        parts.append(((2 * means / number_format.highest**0.5).float().clamp_(min=SMALLEST), rows))
    return _merge(parts, (w.shape[0], group_count(w.shape[1], spec.group_size)), torch.float32, w.device)


def stored_scales(scales: Tensor) -> Tensor:
    """Learned scales [rows, groups] as they are stored and computed with: float16, positive."""
    return scales.detach().float().clamp(SMALLEST, LARGEST_SCALE).half()


def learned_weight(w: Tensor, scales: Tensor, spec: MatrixSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a weight with learned scales is worth, [rows, cols] in `dtype`, without gradient.

    Args:
        w: float32 [rows, cols], or int8 for codes that are fixed.
        scales: float32 [rows, groups], as they are trained.
        spec: formats of the rows.

    Raises:
        ValueError: as `encode_matrix`.
    """
    stored = stored_scales(scales)
    if w.dtype == torch.int8:
        return decode_matrix(Encoded(w, stored), spec).to(dtype)
    return quantize_dequantize(w, spec, dtype, stored)


def rebase_weight(w: Tensor, codes: Tensor, before: Tensor, after: Tensor, spec: MatrixSpec) -> Tensor:
    """A weight float32 [rows, cols] that has the given codes at new scales, so that training can go on from there.

    Every weight keeps its place between the levels: it is multiplied by new over old scale. Where the rounding of that
    puts it into another code's interval, it moves to the nearest float inside; `encode_matrix` of the result with
    `after` gives exactly `codes`.

    Args:
        w: float32 [rows, cols], whose codes at the scales `before` are `codes`.
        codes: int8 [rows, cols].
        before, after: float16 [rows, groups], as `stored_scales` gives them.
        spec: formats of the rows.

    Raises:
        ValueError: as `encode_matrix`.
    """
    carried = w.detach().float().clone()
    factor = after.float() / before.float()
    _, group, full = _grouping(carried, spec.group_size)
    for rows, cols, groups in _blocks(carried, group, full):
        part = carried[rows, cols].unflatten(1, (groups.stop - groups.start, -1))
        carried[rows, cols] = (part * factor[rows, groups].unsqueeze(2)).flatten(1)
    for _ in range(NUDGES):
        wrong = encode_matrix(carried, spec, after).codes != codes
        if not wrong.any():
            return carried
        levels = decode_matrix(Encoded(codes, after), spec)
        carried = torch.where(wrong, torch.nextafter(carried, levels), carried)
    wrong = encode_matrix(carried, spec, after).codes != codes
    return torch.where(wrong, decode_matrix(Encoded(codes, after), spec), carried)  # a level has its own code


def ste_target(w: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
    """A stand-in [rows, cols] without meaning or memory: the gradient it is given, that with respect to the decoded
    weight, goes on to `w` and `scales` as described above.

    Args:
        w: floating [rows, cols], or int8 for codes that are fixed and take no gradient.
        scales: floating [rows, groups].
        spec: formats of the rows.
    """
    if spec.block_formats is not None:
        strips = spec.strips(w.shape)
        parts = [ste_target(strip.of(w), strip.scales_of(scales), strip.spec) for strip in strips]
        return join_strips(strips, parts)
    inlet: Tensor = _Inlet.apply(w, scales, spec)
    return inlet


class _Inlet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(w, scales)
        return scales.new_zeros(1, 1).expand(w.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        w, scales = ctx.saved_tensors
        to_w, to_scales = [], []
        for number_format, rows in ctx.spec.parts:
            upstream, part = _select(gradient, rows), _select(w, rows)
            if w.dtype == torch.int8:
                to_scales.append((_through_codes(number_format, upstream, part, ctx.spec.group_size), rows))
                continue
            step = stored_scales(_select(scales, rows)).to(scales.dtype)
            found = _through_step(number_format, upstream, part, step, ctx.spec.group_size)
            to_w.append((found[0], rows))
            to_scales.append((found[1], rows))
        whole = _merge(to_w, (*w.shape,), w.dtype, w.device) if to_w else None
        return whole, _merge(to_scales, (*scales.shape,), scales.dtype, w.device), None


def _through_step(
    number_format: Format, gradient: Tensor, w: Tensor, step: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """LSQ's gradients of w [rows, cols] and of the steps [rows, groups]."""
    top = number_format.highest
    low, high = number_format.min_code, 2 * top - number_format.maximum  # what is beyond the outer levels' intervals
    to_w, to_step = torch.empty_like(w), torch.empty_like(step)
    _, group, full = _grouping(w, group_size)
    for rows, cols, groups in _blocks(w, group, full):
        shape = (groups.stop - groups.start, -1)
        upstream = gradient[rows, cols].unflatten(1, shape)
        ratio = w[rows, cols].unflatten(1, shape) / step[rows, groups].unsqueeze(2)
        inside = (ratio > low) & (ratio < high)
        slope = number_format.level_(number_format.choose_(ratio.clone(), low)).sub_(ratio.mul_(inside))
        to_w[rows, cols] = (upstream * inside).flatten(1)
        to_step[rows, groups] = (upstream * slope).sum(2).div_((ratio.shape[2] * top) ** 0.5)
    return to_w, to_step


def _through_codes(number_format: Format, gradient: Tensor, codes: Tensor, group_size: int) -> Tensor:
    """The gradient of scales [rows, groups] of fixed codes int8 [rows, cols]."""
    _, group, full = _grouping(codes, group_size)
    found = gradient.new_empty(len(codes), group_count(codes.shape[1], group))
    for rows, cols, groups in _blocks(codes, group, full):
        shape = (groups.stop - groups.start, -1)
        level = number_format.level_(codes[rows, cols].to(gradient.dtype)).unflatten(1, shape)
        found[rows, groups] = (gradient[rows, cols].unflatten(1, shape) * level).sum(2)
    return found
