"""Learned step: the scale of a group is trained like a weight instead of following from the group's weights.

Forward, the codes are those of the format with the scale `s` (rounded to fp16 first, as everywhere). Backward, with
`r = w / s` and the format's smallest and largest code `lo, hi` (Esser et al., "Learned step size quantization", arXiv
1902.08153, section 2.1),

    d ŵ / d w = 1 where r is in range, else 0
    d ŵ / d s = (level(r) - r where r is in range, else level(r)) / sqrt(N·Qp)

where `N` is the number of weights of the group and `Qp` the largest level: without the factor the few scales would get
gradients as large as those of all their weights together. Training starts at `s = 2·mean|w| / sqrt(Qp)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgerazor.formats._base import Format, block_rows, group_count
from edgerazor.formats._matrix import MatrixSpec

#: The smallest scale that fp16 can hold: a learned scale never reaches zero.
SMALLEST = 2.0**-24


def initial_scales(w: Tensor, spec: MatrixSpec) -> Tensor:
    """The published start, `2·mean|w| / sqrt(Qp)`, float32 [rows, groups] for w [rows, cols]."""
    scales = torch.empty(w.shape[0], group_count(w.shape[1], spec.group_size), device=w.device)
    for number_format, rows in spec.parts:
        chosen = slice(None) if rows is None else rows.to(w.device)
        parts = w.detach().float()[chosen].split(spec.group_size, dim=1)
        means = torch.stack([part.abs().mean(dim=1, dtype=torch.float64) for part in parts], dim=1)
        scales[chosen] = (2 * means / highest(number_format) ** 0.5).float()
    return scales.clamp_(min=SMALLEST)


def highest(number_format: Format) -> float:
    """`Qp`, the largest level of a format in units of its scale."""
    return float(number_format.level_(torch.tensor([float(number_format.maximum)])))


def learned_round_trip(w: Tensor, scales: Tensor, spec: MatrixSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """`decode(encode(w, scales))` [rows, cols] in `dtype`, differentiable with respect to both as described above.

    Args:
        w: float32 [rows, cols].
        scales: float32 [rows, groups]; below `SMALLEST` they count as that.
        spec: formats of the rows.
    """
    return _LearnedStep.apply(w, scales, spec, dtype)


def stored_scales(scales: Tensor) -> Tensor:
    """Learned scales as they are stored: float16, positive."""
    return scales.detach().clamp(min=SMALLEST).half()


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scales: Tensor, spec: MatrixSpec, dtype: torch.dtype) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(w, scales)
        stored = stored_scales(scales)
        rounded = torch.empty(w.shape, dtype=dtype, device=w.device)
        for number_format, rows in _blocks(w, spec):
            codes = number_format.encode(w[rows], spec.group_size, stored[rows])
            rounded[rows] = number_format.decode(*codes, spec.group_size).to(dtype)
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w, scales = ctx.saved_tensors
        group = ctx.spec.group_size
        to_w, to_scales = torch.empty_like(w), torch.empty_like(scales)
        stored = stored_scales(scales).float()
        for number_format, rows in _blocks(w, ctx.spec):
            top = highest(number_format)
            offset = top - number_format.maximum  # of the levels from the codes
            low, high = number_format.minimum + offset, top
            parts = zip(w[rows].split(group, 1), gradient[rows].float().split(group, 1), strict=True)
            for index, (part, upstream) in enumerate(parts):
                ratio = part / stored[rows, index, None]  # [n, group]
                level = number_format.level_(number_format.choose_(ratio.clone()))
                inside = (ratio >= low - offset) & (ratio <= high + offset)
                to_w[rows, index * group : index * group + part.shape[1]] = upstream * inside
                slope = torch.where(inside, level - ratio, level)
                to_scales[rows, index] = (upstream * slope).sum(1) / (part.shape[1] * top) ** 0.5
        return to_w, to_scales, None, None


def _blocks(w: Tensor, spec: MatrixSpec) -> Iterator[tuple[Format, Tensor]]:
    """Formats with some of their rows at a time, int64 [n]."""
    for number_format, rows in spec.parts:
        every = torch.arange(w.shape[0], device=w.device) if rows is None else rows.to(w.device)
        for block in every.split(block_rows(w)):
            yield number_format, block
