"""Clipping: scales of the least error weighted by the inputs of the weights.

An error in a weight whose input is always small does no harm. So each group takes the scale that has the least
`sum_i h_i (w_i - w'_i)^2`, where `h_i` is the mean of `x_i^2` over the inputs `x`. Some multiples of the published
rule's scale and of the absmax scale, at which the largest level is the largest weight, are tried, and the best is
refined. For given codes the best scale is the quotient `sum h w level / sum h level^2`, for a given scale the best
codes are the nearest, and taking turns only gets better (Lloyd, IEEE Trans. Inf. Theory 28(2), 1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.formats.core.base import Format, block_rows, cache_blocks, group_count, grouping
from edgerazor.formats.core.lsq import stored_scales
from edgerazor.formats.core.matrix import BlockView, MatrixSpec, join_block_views, merge_rows

#: The scales that are tried, as multiples of that of the published rule, and of the absmax scale.
RULE_MULTIPLES = (0.35, 0.42, 0.49, 0.56, 0.62, 0.68, 0.74, 0.8, 0.85, 0.9, 0.95, 1.05, 1.12, 1.2)
ABSMAX_MULTIPLES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Turns of nearest codes and best scale for them after that.
REFINEMENTS = 6


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
    views = spec.block_views(w.shape)
    return join_block_views(views, [_view_scales(view, view.select(w.detach()), importance) for view in views])


def _view_scales(view: BlockView, w: Tensor, importance: Tensor | None) -> Tensor:
    """Scales float16 [rows, groups] of a block view, w [rows, width], some rows of one format at a time."""
    if importance is not None:
        importance = importance[view.columns].view(view.blocks, view.width)
    parts = []
    for number_format, rows in view.spec.format_rows:
        scales = []
        indices = torch.arange(len(w), device=w.device) if rows is None else rows.to(w.device)
        for block in indices.split(block_rows(w)):
            block_importance = None if importance is None else importance[block % view.blocks]
            scales.append(_row_scales(number_format, w[block].float(), block_importance, view.spec.group_size))
        parts.append((torch.cat(scales), rows))
    shape = (view.rows, group_count(view.width, view.spec.group_size))
    return merge_rows(parts, shape, torch.float16, w.device)


def _row_scales(number_format: Format, w: Tensor, importance: Tensor | None, group_size: int) -> Tensor:
    """Scales float16 [rows, groups] of rows of one format: w and importance float32 [rows, cols]."""
    _, group, full = grouping(w, group_size)
    scales = torch.empty(len(w), group_count(w.shape[1], group), dtype=torch.float16, device=w.device)
    for rows, cols, groups in cache_blocks(w, group, full):
        shape = (groups.stop - groups.start, -1)
        block_importance = None if importance is None else importance[rows, cols].unflatten(1, shape)
        scales[rows, groups] = _search(number_format, w[rows, cols].unflatten(1, shape), block_importance)
    return scales


def _search(number_format: Format, w: Tensor, importance: Tensor | None) -> Tensor:
    """The best scales, float16 [rows, groups], for w and importance [rows, groups, group]."""
    rule = number_format.scale_rule(w)
    if not torch.isfinite(rule).all():
        raise ValueError("a weight is not finite")
    absmax = w.abs().amax(2) / number_format.max_level
    best = stored_scales(rule)
    least = _errors(number_format, w, importance, best)
    candidates = (
        *(multiple * rule for multiple in RULE_MULTIPLES),
        *(multiple * absmax for multiple in ABSMAX_MULTIPLES),
    )
    for candidate in candidates:
        best, least = _better(number_format, w, importance, stored_scales(candidate), best, least)
    for _ in range(REFINEMENTS):
        candidate = _best_for_codes(number_format, w, importance, best)
        best, least = _better(number_format, w, importance, stored_scales(candidate), best, least)
    return best


def _better(
    number_format: Format, w: Tensor, importance: Tensor | None, candidate: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """The better of two scales of each group, and its error."""
    errors = _errors(number_format, w, importance, candidate)
    better = errors < least
    return torch.where(better, candidate, best), torch.where(better, errors, least)


def _errors(number_format: Format, w: Tensor, importance: Tensor | None, scales: Tensor) -> Tensor:
    """Weighted squared error of each group at stored scales, float64 [rows, groups]."""
    codes, _ = number_format.encode_block(w.flatten(1), w.shape[1], scales)
    errors = number_format.decode_block_(codes, scales).sub_(w).square_()
    return (errors if importance is None else errors.mul_(importance)).sum(2, dtype=torch.float64)


def _best_for_codes(number_format: Format, w: Tensor, importance: Tensor | None, scales: Tensor) -> Tensor:
    """The best scales for the codes that stored scales give, float64 [rows, groups]."""
    codes, _ = number_format.encode_block(w.flatten(1), w.shape[1], scales)
    levels = number_format.level_(codes)
    weighted = levels if importance is None else levels * importance
    squares = (weighted * levels).sum(2, dtype=torch.float64)
    return (weighted * w).sum(2, dtype=torch.float64) / squares.clamp_(min=torch.finfo(torch.float64).tiny)
