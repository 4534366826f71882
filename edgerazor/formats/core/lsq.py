"""LSQ: the scale of a group ("step size") is trained like a weight instead of following from the group's weights.

Forward, the codes are those of the format with the scale `s` (rounded to fp16 first, as everywhere) and may be any that
can be stored, `lo` to `hi`. Backward, with `r = w / s` (Esser et al., "Learned step size quantization", arXiv
1902.08153, section 2.1),

    d w' / d w = 1 where lo < r < hi, else 0
    d w' / d s = (level(r) - r where lo < r < hi, else level(r)) / sqrt(N*Qp)

where `N` is the number of weights of the group and `Qp` the largest level: without the factor the few scales would get
gradients as large as those of all their weights together. The paper initializes `s = 2*mean|w| / sqrt(Qp)`; ours begins
with the scale of least squared error.

Where the codes are frozen and only scales are trained, `w' = s * level` is a product like any other, and so is its
gradient: `d w' / d s = level`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgerazor.formats.core.base import LARGEST_SCALE, Encoded, Format, cache_blocks, group_count, grouping
from edgerazor.formats.core.matrix import (
    MatrixSpec,
    decode_matrix,
    encode_matrix,
    join_block_views,
    merge_rows,
    quantize_dequantize,
    select_rows,
)

#: The smallest scale that fp16 can hold: a learned scale never reaches zero.
SMALLEST = 2.0**-24
#: Most floats that rounding may leave between a weight and the interval of its code, with room to spare.
NUDGES = 4

#: w float32 [rows, cols], scales float32 [rows, groups] that fp16 holds, the formats, and the dtype of the result ->
#: the dequantized weight, or None where it cannot.
Rounding = Callable[[Tensor, Tensor, MatrixSpec, torch.dtype], Tensor | None]
#: The gradient of that weight, w, scales, formats -> gradients of w and scales, float32, or None where it cannot.
Gradients = Callable[[Tensor, Tensor, Tensor, MatrixSpec], tuple[Tensor, Tensor] | None]
_accelerated: list[tuple[Rounding, Gradients]] = []


def use_learned_kernels(rounding: Rounding, gradients: Gradients) -> None:
    """Ask these functions first from now on.

    What the first returns must equal what PyTorch computes here to the bit; the second may add up in another order.
    """
    _accelerated[:] = [(rounding, gradients)]


def initial_scales(w: Tensor, spec: MatrixSpec) -> Tensor:
    """The scales that training begins with, float32 [rows, groups], positive, for w [rows, cols].

    They are those of least squared error or, where the specification says so, the published `2*mean|w| / sqrt(Qp)`.
    """
    if not spec.published:
        return stored_scales(encode_matrix(w, spec).scales).float()
    if spec.block_formats is not None:
        views = spec.block_views(w.shape)
        return join_block_views(views, [initial_scales(view.select(w), view.spec) for view in views])
    spec.check_shape(w.shape)
    parts = []
    for number_format, rows in spec.format_rows:
        selected, group, full = grouping(select_rows(w.detach(), rows), spec.group_size)
        means = torch.empty(len(selected), group_count(w.shape[1], group), dtype=torch.float64, device=w.device)
        for block, cols, groups in cache_blocks(selected, group, full):
            grouped = selected[block, cols].unflatten(1, (groups.stop - groups.start, -1))
            means[block, groups] = grouped.abs().mean(dim=2, dtype=torch.float64)
        parts.append(((2 * means / number_format.max_level**0.5).float().clamp_(min=SMALLEST), rows))
    return merge_rows(parts, (w.shape[0], group_count(w.shape[1], spec.group_size)), torch.float32, w.device)


def stored_scales(scales: Tensor) -> Tensor:
    """Learned scales [rows, groups] as they are stored and computed with: float16, positive."""
    return scales.detach().float().clamp(SMALLEST, LARGEST_SCALE).half()


def learned_weight(w: Tensor, scales: Tensor, spec: MatrixSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized weight with learned scales, [rows, cols] in `dtype`, without gradient.

    Args:
        w: float32 [rows, cols], or int8 for frozen codes.
        scales: float32 [rows, groups], as they are trained.
        spec: formats of the rows.

    Raises:
        ValueError: as `encode_matrix`.
    """
    stored = stored_scales(scales)
    if w.dtype == torch.int8:
        return decode_matrix(Encoded(w, stored), spec).to(dtype)
    spec.check_shape(w.shape)
    rounded = next((rounding(w, stored.float(), spec, dtype) for rounding, _ in _accelerated), None)
    return quantize_dequantize(w, spec, dtype, stored) if rounded is None else rounded


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
    rebased = w.detach().float().clone()
    factor = after.float() / before.float()
    _, group, full = grouping(rebased, spec.group_size)
    for rows, cols, groups in cache_blocks(rebased, group, full):
        grouped = rebased[rows, cols].unflatten(1, (groups.stop - groups.start, -1))
        rebased[rows, cols] = (grouped * factor[rows, groups].unsqueeze(2)).flatten(1)
    for _ in range(NUDGES):
        wrong = encode_matrix(rebased, spec, after).codes != codes
        if not wrong.any():
            return rebased
        levels = decode_matrix(Encoded(codes, after), spec)
        rebased = torch.where(wrong, torch.nextafter(rebased, levels), rebased)
    wrong = encode_matrix(rebased, spec, after).codes != codes
    return torch.where(wrong, decode_matrix(Encoded(codes, after), spec), rebased)  # a level has its own code


def ste_target(w: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
    """Tensor [rows, cols] that receives the straight-through gradient of the dequantized weight.

    Its backward passes that gradient on to `w` and `scales` as LSQ has it. Do not read its value: it is one zero,
    expanded to the shape, and takes no memory.

    Args:
        w: floating [rows, cols], or int8 for frozen codes, which take no gradient.
        scales: floating [rows, groups].
        spec: formats of the rows.
    """
    if spec.block_formats is not None:
        views = spec.block_views(w.shape)
        return join_block_views(
            views, [ste_target(view.select(w), view.select_scales(scales), view.spec) for view in views]
        )
    target: Tensor = _SteTarget.apply(w, scales, spec)
    return target


class _SteTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(w, scales)
        return scales.new_zeros(1, 1).expand(w.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        w, scales = ctx.saved_tensors
        steps = stored_scales(scales).to(scales.dtype)
        accelerated = next((gradients(gradient, w, steps.float(), ctx.spec) for _, gradients in _accelerated), None)
        if accelerated is not None:
            return accelerated[0], accelerated[1].to(scales.dtype), None
        to_w, to_scales = [], []
        for number_format, rows in ctx.spec.format_rows:
            upstream, selected = select_rows(gradient, rows), select_rows(w, rows)
            if w.dtype == torch.int8:
                to_scales.append((_frozen_codes_gradient(number_format, upstream, selected, ctx.spec.group_size), rows))
                continue
            step = select_rows(steps, rows)
            row_gradient, step_gradient = _lsq_gradients(number_format, upstream, selected, step, ctx.spec.group_size)
            to_w.append((row_gradient, rows))
            to_scales.append((step_gradient, rows))
        whole = merge_rows(to_w, (*w.shape,), w.dtype, w.device) if to_w else None
        return whole, merge_rows(to_scales, (*scales.shape,), scales.dtype, w.device), None


def _lsq_gradients(
    number_format: Format, gradient: Tensor, w: Tensor, step: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """LSQ's gradients with respect to w [rows, cols] and to the step sizes [rows, groups]."""
    max_level = number_format.max_level
    low, high = number_format.min_code, 2 * max_level - number_format.max_code  # beyond them, weights are clipped
    to_w, to_step = torch.empty_like(w), torch.empty_like(step)
    _, group, full = grouping(w, group_size)
    for rows, cols, groups in cache_blocks(w, group, full):
        shape = (groups.stop - groups.start, -1)
        upstream = gradient[rows, cols].unflatten(1, shape)
        ratio = w[rows, cols].unflatten(1, shape) / step[rows, groups].unsqueeze(2)
        inside = (ratio > low) & (ratio < high)
        slope = number_format.level_(number_format.round_to_code_(ratio.clone(), low)).sub_(ratio.mul_(inside))
        to_w[rows, cols] = (upstream * inside).flatten(1)
        to_step[rows, groups] = (upstream * slope).sum(2).div_((ratio.shape[2] * max_level) ** 0.5)
    return to_w, to_step


def _frozen_codes_gradient(number_format: Format, gradient: Tensor, codes: Tensor, group_size: int) -> Tensor:
    """The gradient with respect to the scales [rows, groups] of frozen codes int8 [rows, cols]."""
    _, group, full = grouping(codes, group_size)
    to_scales = gradient.new_empty(len(codes), group_count(codes.shape[1], group))
    for rows, cols, groups in cache_blocks(codes, group, full):
        shape = (groups.stop - groups.start, -1)
        level = number_format.level_(codes[rows, cols].to(gradient.dtype)).unflatten(1, shape)
        to_scales[rows, groups] = (gradient[rows, cols].unflatten(1, shape) * level).sum(2)
    return to_scales
