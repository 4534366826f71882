"""GPTQ: rounding that lets the later columns of a row make up for the errors of the earlier ones.

Inputs of a layer are correlated, so the error of one weight can be undone by those that are not rounded yet (Frantar et
al., arXiv 2210.17323). With `H` the mean of `x x^T` over the inputs `x`, the output error of a row is `dw H dw^T`.
Columns are rounded in order, and each time the later ones move to where this error is least. What is kept of a column
is its compensated weight, as it was just before it was rounded: rounding all of them at once, at the scales that
`clip.py` found on the way, gives exactly the codes that GPTQ chose.

Where earlier layers are rounded, too, their errors have reached the input already. Then the goal is what the unrounded
model gives of its own input, `|w x_T - w' x|^2`, as in GPTAQ (Li et al., arXiv 2504.02692) and Qronos (Zhang et al.,
arXiv 2505.11695). Its minimum without rounding is `w E[x_T x^T] H^-1`, and the excess of any other w' over it is
`(w' - that) H (w' - that)^T`: so the weights move towards it first, and GPTQ rounds what they are then. They move half
of the way, since moments of few tokens are not those of others (`DRIFT_SHARE`; GPTAQ's own program has a share, too).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor.formats.core.base import Format, group_count
from edgerazor.formats.core.clip import search_scales
from edgerazor.formats.core.matrix import MatrixSpec

#: Added to the diagonal of the Hessian, as a share of its mean, so that it can be inverted.
DAMPING = 0.01
#: How far weights move towards the outputs of unrounded inputs, from 0 to 1. KL at 0, 1/2 and 1: realtext-4m at 2 bits
#: 0.327, 0.195 and 0.182, SmolLM2-135M at 2.4 real bits (16,384 tokens) 1.45, 1.30 and 1.60. A training of SmolLM2 that
#: began all of the way ended worse than one that began at 0 with a fifth of its tokens, so none begins elsewhere.
DRIFT_SHARE = 0.5
#: Columns in a block whose corrections of all later columns are gathered before they are applied ("lazy batch").
LAZY = 128


def gptq_quantize(w: Tensor, spec: MatrixSpec, hessian: Tensor, drift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """GPTQ: weights that `encode_matrix` turns, at the scales given with them, into error-compensated codes.

    Args:
        w: any floating dtype [rows, cols].
        spec: formats of the rows or blocks; rows of all formats are rounded side by side.
        hessian: symmetric [cols, cols], the mean of `x x^T` over inputs x; 1 % of its mean diagonal is added to it.
        drift: [cols, cols], the mean of `(x_T - x) x^T`, where x_T is what x would be without any rounding: then
            the weights first move to where they give of x, in the least squares, what they gave of x_T.

    Returns:
        The compensated weights, float32 [rows, cols], each as it was just before it was rounded, and the scales,
        float16 [rows, groups], positive, each found by `search_scales` when the group's first column was reached.

    Raises:
        ValueError: a number is not finite, the Hessian is not positive semi-definite, or a shape does not fit.
    """
    spec.check_shape(w.shape)
    rows, cols = w.shape
    if tuple(hessian.shape) != (cols, cols):
        raise ValueError(f"the Hessian must be {[cols, cols]} for {cols} columns, got {list(hessian.shape)}")
    factor = _inverse_factor(hessian.detach().to(w.device)).float()
    importance = factor.diagonal().double().pow(-2).float()
    if drift is not None:
        w = _moved(w.detach(), hessian, drift)
    columns = w.detach().t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # [cols, rows]
    group = min(spec.group_size, cols)
    scales = torch.empty(rows, group_count(cols, group), dtype=torch.float16, device=w.device)
    pivots = factor.diagonal().tolist()
    parts: list[_Part] = []
    for start, stop in _lazy_blocks(cols, group):
        errors = torch.empty(stop - start, rows, device=w.device)
        for j in range(start, stop):
            if j % group == 0:
                group_spec = _group_spec(spec, j // group, rows)
                searched = search_scales(columns[j : j + group].t(), group_spec, importance[j : j + group])[:, 0]
                scales[:, j // group] = searched
                parts = _parts(group_spec, searched.float())
            column, error = columns[j], errors[j - start]
            torch.sub(column, _rounded(column, parts), out=error).div_(pivots[j])
            columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    if not torch.isfinite(columns).all():
        raise ValueError("a weight is not finite")
    return columns.t().contiguous(), scales


class _Part(NamedTuple):
    """Rows of one format in a group of columns: their numbers (None for all) and scales, float32 [rows]."""

    number_format: Format
    rows: Tensor | None
    scales: Tensor


def _parts(spec: MatrixSpec, scales: Tensor) -> list[_Part]:
    """The rows of each format, and of the scales [rows] of one group theirs."""
    parts = []
    for number_format, numbers in spec.format_rows:
        rows = None if numbers is None else numbers.to(scales.device)
        parts.append(_Part(number_format, rows, scales if rows is None else scales[rows]))
    return parts


def _rounded(column: Tensor, parts: Sequence[_Part]) -> Tensor:
    """A column [rows], rounded at the scales of its group, as `quantize_dequantize` does it; float32.

    A matrix has thousands of columns, and each waits for the one before it: calls are what this takes.
    """
    rounded = torch.empty_like(column)
    for number_format, rows, scales in parts:
        part = column if rows is None else column[rows]
        codes = number_format.round_to_code_(part / scales, number_format.min_code)
        values = number_format.level_(codes).mul_(scales)
        if rows is None:
            return values
        rounded[rows] = values
    return rounded


def _moved(w: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """`w` on its way to what gives of `x`, with least squared error, what `w` gives of `x_T`; float32 [rows, cols].

    All the way is `w + w D (H + damping)^-1`.
    """
    factor = _inverse_factor(hessian.to(w.device))
    wide = w.double()
    return (wide + DRIFT_SHARE * (wide @ drift.double().to(w.device) @ factor.T @ factor)).float()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U, float64 [cols, cols], with `U^T U = (H + damping)^-1`.

    Row j of it says how the columns after j make up for an error in column j.
    """
    damped = hessian.double().clone()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed or not torch.isfinite(lower).all():
        raise ValueError("the Hessian is not finite or not positive semi-definite")
    upper = lower.flip(0, 1)  # H = R R^T with R upper triangular, so U = R^-1
    return torch.linalg.solve_triangular(
        upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True
    )


def _lazy_blocks(cols: int, group: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `LAZY` columns, as (first, last + 1).

    Each is some whole groups or a part of one group, so that all columns of a group are up to date when it begins.
    """
    unit = max(group, LAZY // group * group)
    for first in range(0, cols, unit):
        end = min(first + unit, cols)
        for start in range(first, end, min(unit, LAZY)):
            yield start, min(start + LAZY, end)


def _group_spec(spec: MatrixSpec, index: int, rows: int) -> MatrixSpec:
    """The formats of the rows of one group of columns."""
    if spec.block_formats is None:
        return spec
    return replace(spec, row_formats=spec.block_formats[:, index].expand(rows).contiguous(), block_formats=None)
