"""Where a training may start instead of the weights' own least error: by inputs, or compensated.

The search for the least error looks at a group alone. Two things know more, from the inputs `x` of the weights:

*Clipping.* An error in a weight whose input is always small does no harm. So each group takes the scale that has the
least `sum_i h_i (w_i - w'_i)^2`, where `h_i` is the mean of `x_i^2`: some shares of the published rule's scale and
of the one that just reaches the largest weight are tried, and the best is refined. For given codes the best is the
quotient `sum h w level / sum h level^2`, for a given scale the best codes are the nearest, and taking turns only gets
better.

*Compensation* (GPTQ; Frantar et al., arXiv 2210.17323). Inputs go together, so the error of one weight can be undone
by those that are not rounded yet. With `H` the mean of `x x^T`, a row's damage is `dw H dw^T`. Columns are rounded in
order, and each time the later ones move to where the damage is least. A column's compensated weight, as it was just
before it was rounded, is kept: rounding all of them at once, at the scales found on the way, gives the very codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from edgerazor.formats.core.base import Format, _blocks, _grouping, block_rows, group_count
from edgerazor.formats.core.lsq import stored_scales
from edgerazor.formats.core.matrix import BlockView, MatrixSpec, _merge, join_strips, quantize_dequantize

#: What is tried: shares of the rule's scale, and of the scale whose highest level is the largest weight.
OF_RULE = (0.35, 0.42, 0.49, 0.56, 0.62, 0.68, 0.74, 0.8, 0.85, 0.9, 0.95, 1.05, 1.12, 1.2)
OF_LARGEST = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Turns of nearest codes and best scale for them after that.
REFINEMENTS = 6
#: Added to the diagonal of the Hessian, as a share of its mean, so that it can be inverted.
DAMPING = 0.01
#: Columns whose corrections of all later columns are gathered before they are applied.
LAZY = 128


def search_scales(w: Tensor, spec: MatrixSpec, importance: Tensor | None = None) -> Tensor:
    """The scales with nearly the least weighted squared error, and never more than that of the published ones.

    Args:
        w: any floating dtype [rows, cols].
        spec: formats of the rows or blocks.
        importance: weight of each column's error, [cols], not negative: second moments of inputs. None: all alike.

    Returns:
        float16 [rows, groups], positive.

    Raises:
        ValueError: a weight or an importance is not finite, an importance is negative, or a shape does not fit.
    """
    if importance is not None:
        if tuple(importance.shape) != (w.shape[1],):
            raise ValueError(f"importance must be [{w.shape[1]}] for {w.shape[1]} columns, got {[*importance.shape]}")
        if not torch.isfinite(importance).all() or (importance < 0).any():
            raise ValueError("an importance is negative or not finite")
        importance = importance.detach().to(w.device, torch.float32)
    strips = spec.strips(w.shape)
    return join_strips(strips, [_strip_scales(strip, strip.of(w.detach()), importance) for strip in strips])


def _strip_scales(strip: BlockView, w: Tensor, importance: Tensor | None) -> Tensor:
    """Scales float16 [rows, groups] of a strip, w [rows, width], some rows of one format at a time."""
    if importance is not None:
        importance = importance[strip.columns].view(strip.blocks, strip.width)
    parts = []
    for number_format, rows in strip.spec.parts:
        found = []
        every = torch.arange(len(w), device=w.device) if rows is None else rows.to(w.device)
        for block in every.split(block_rows(w)):
            weighted = None if importance is None else importance[block % strip.blocks]
            found.append(_row_scales(number_format, w[block].float(), weighted, strip.spec.group_size))
        parts.append((torch.cat(found), rows))
    shape = (strip.rows, group_count(strip.width, strip.spec.group_size))
    return _merge(parts, shape, torch.float16, w.device)


def _row_scales(number_format: Format, w: Tensor, importance: Tensor | None, group_size: int) -> Tensor:
    """Scales float16 [rows, groups] of rows of one format: w and importance float32 [rows, cols]."""
    _, group, full = _grouping(w, group_size)
    found = torch.empty(len(w), group_count(w.shape[1], group), dtype=torch.float16, device=w.device)
    for rows, cols, groups in _blocks(w, group, full):
        shape = (groups.stop - groups.start, -1)
        weighted = None if importance is None else importance[rows, cols].unflatten(1, shape)
        found[rows, groups] = _search(number_format, w[rows, cols].unflatten(1, shape), weighted)
    return found


def _search(number_format: Format, w: Tensor, importance: Tensor | None) -> Tensor:
    """The best scales, float16 [rows, groups], that were found for w and importance [rows, groups, group]."""
    rule = number_format.scale_rule(w)
    if not torch.isfinite(rule).all():
        raise ValueError("a weight is not finite")
    reaching = w.abs().amax(2) / number_format.highest
    best = stored_scales(rule)
    least = _errors(number_format, w, importance, best)
    others = (*(share * rule for share in OF_RULE), *(share * reaching for share in OF_LARGEST))
    for candidate in others:
        best, least = _better(number_format, w, importance, stored_scales(candidate), best, least)
    for _ in range(REFINEMENTS):
        candidate = _for_codes(number_format, w, importance, best)
        best, least = _better(number_format, w, importance, stored_scales(candidate), best, least)
    return best


def _better(
    number_format: Format, w: Tensor, importance: Tensor | None, candidate: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """The better scale of each group and its error."""
    errors = _errors(number_format, w, importance, candidate)
    better = errors < least
    return torch.where(better, candidate, best), torch.where(better, errors, least)


def _errors(number_format: Format, w: Tensor, importance: Tensor | None, scales: Tensor) -> Tensor:
    """Weighted squared error of each group at stored scales, float64 [rows, groups]."""
    codes, _ = number_format._encode(w.flatten(1), w.shape[1], scales)
    wrong = number_format._decode_(codes, scales).sub_(w).square_()
    return (wrong if importance is None else wrong.mul_(importance)).sum(2, dtype=torch.float64)


def _for_codes(number_format: Format, w: Tensor, importance: Tensor | None, scales: Tensor) -> Tensor:
    """The best scales for the codes that stored scales give, float64 [rows, groups]."""
    codes, _ = number_format._encode(w.flatten(1), w.shape[1], scales)
    levels = number_format.level_(codes)
    weighted = levels if importance is None else levels * importance
    lengths = (weighted * levels).sum(2, dtype=torch.float64)
    return (weighted * w).sum(2, dtype=torch.float64) / lengths.clamp_(min=torch.finfo(torch.float64).tiny)


def gptq_quantize(w: Tensor, spec: MatrixSpec, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ: weights that `encode_matrix` turns, at the scales given with them, into error-compensated codes.

    Args:
        w: any floating dtype [rows, cols].
        spec: formats of the rows or blocks; rows of all formats are rounded side by side.
        hessian: symmetric [cols, cols], the mean of `x x^T` over inputs x; 1 % of its mean diagonal is added to it.

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
    columns = w.detach().t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # [cols, rows]
    group = min(spec.group_size, cols)
    scales = torch.empty(rows, group_count(cols, group), dtype=torch.float16, device=w.device)
    of_group = spec
    for start, stop in _lazy_blocks(cols, group):
        errors = torch.empty(stop - start, rows, device=w.device)
        for j in range(start, stop):
            index = j // group
            if j % group == 0:
                of_group = _group_spec(spec, index, rows)
                weights = columns[j : j + group].t()
                scales[:, index] = search_scales(weights, of_group, importance[j : j + group])[:, 0]
            rounded = quantize_dequantize(
                columns[j].unsqueeze(1), of_group, scales=scales[:, index : index + 1]
            ).squeeze(1)
            errors[j - start] = (columns[j] - rounded) / factor[j, j]
            columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t().contiguous(), scales


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
    """Runs of at most `LAZY` columns: some whole groups, or a part of one, so that all of a group's are up to date when
    it begins."""
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
