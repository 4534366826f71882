"""The same share of a wider format in every matrix, without measuring which weights matter.

Every matrix gets two formats, a narrower and a wider one, and the same share `p` of its weights has the wider. Between
1.58 and 4 bits the two are ternary and int4, above 4 bits int4 and int8, or those that the recipe names. Strategies
differ in which weights get the wider format. A *unit* has one format: a row, a group of one row (a block), or a group
of columns in all rows; and the units with the wider format are

- `interleave`: spread evenly. With rows this is EdgeRazor's structural mixed precision (arXiv 2605.04062, section 3);
- `variance`: those whose weights have the highest variance (of blocks: "dynamic" in EdgeRazor's code);
- `first`: those that come first (of blocks: its "static", of columns: its "static column-wise").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.allocate.plan import digits
from edgerazor.errors import usage_error
from edgerazor.models import QuantTarget
from edgerazor.recipe import Calibrate

#: Bits that name a share of int4 rows, although the average of such rows differs from them in the third digit.
NAMED_SHARES = {1.58: 0.0, 1.88: 1 / 8, 2.79: 1 / 2, 4.0: 1.0}


class Mixture(NamedTuple):
    """Two formats, the narrower first, and the share of the weights that gets the wider one.

    `stride` is set for EdgeRazor's published shares: every n-th unit is wide, beginning with the first. Else it is 0.
    """

    low: str
    high: str
    share: float
    stride: int = 0


def mixture_of(settings: Calibrate) -> Mixture:
    """The formats to mix for the requested bits; of a single one, nothing else.

    Raises:
        UserError: they are not two, the narrower first, or the bits do not lie between theirs.
    """
    bits = settings.bits
    names = settings.formats or (("ternary", "int4") if bits <= 4 else ("int4", "int8"))
    widths = [formats.get(name).nominal_bits for name in names]
    if len(names) == 1:
        if bits != widths[0]:
            raise usage_error(
                f"--bits is {bits:g}, but {names[0]} alone has {widths[0]:g}.", "Ask for these, or for two --formats."
            )
        return Mixture(names[0], names[0], 0.0)
    if len(widths) != 2 or widths[0] >= widths[1]:
        raise usage_error(f"--formats is {','.join(names)}; expected one format, or two, the narrower first.")
    (low, high), (low_bits, high_bits) = names, widths
    if not low_bits <= bits <= high_bits:
        raise usage_error(
            f"--bits is {bits:g}, but mixing {low} and {high} gives {low_bits:g} to {high_bits:g} bits.",
            "Ask for bits between, or for other --formats.",
        )
    if (low, high) == ("ternary", "int4") and bits in NAMED_SHARES:
        share = NAMED_SHARES[bits]
        return Mixture(low, high, share, int(1 / share) if share else 0)
    return Mixture(low, high, (bits - low_bits) / (high_bits - low_bits))


def choose(
    target: QuantTarget, settings: Calibrate, mixture: Mixture, weight_of: Callable[[str], Tensor] | None = None
) -> Tensor:
    """Which units of a matrix get the wider format: bool [rows], or [rows, groups], or [1, groups] for all rows.

    The share of its weights is that of the mixture: never more, and less by no more than one unit; but EdgeRazor's
    published interleave may round up to a unit more.
    """
    weight = None
    if settings.plan == "variance":
        if weight_of is None:
            raise ValueError("the strategy variance looks at weights, but was given none")
        weight = weight_of(target.name).detach()
        rotation = formats.find_rotation(settings.rotation, target.columns)
        weight = weight if rotation is None else rotation.rotate(weight)
    group = min(settings.group_size, target.columns)
    choose_units = {"row": _choose_rows, "column": _choose_columns, "block": _choose_blocks}[settings.granularity]
    return choose_units(target, group, mixture, settings.plan, weight)


def _choose_rows(target: QuantTarget, group: int, mixture: Mixture, plan: str, weight: Tensor | None) -> Tensor:
    if plan == "interleave":
        return spread(target.rows, mixture)
    ranks = -torch.arange(target.rows) if weight is None else variances(weight, target.columns)[:, 0]
    return _highest_ranked(ranks, torch.ones(target.rows), mixture.share * target.rows)


def _choose_blocks(target: QuantTarget, group: int, mixture: Mixture, plan: str, weight: Tensor | None) -> Tensor:
    widths = _widths(target.columns, group)
    if plan == "interleave":  # among the whole groups, and among the shorter last ones
        whole = target.columns // group
        ends = [spread(target.rows * count, mixture).view(target.rows, count) for count in (whole, len(widths) - whole)]
        return torch.cat(ends, dim=1)
    ranks = -torch.arange(target.rows * len(widths)) if weight is None else variances(weight, group).flatten()
    wide = _highest_ranked(ranks, widths.repeat(target.rows), mixture.share * target.weights)
    return wide.view(target.rows, -1)


def _choose_columns(target: QuantTarget, group: int, mixture: Mixture, plan: str, weight: Tensor | None) -> Tensor:
    """Whole columns of groups as far as the share goes, and the next one in as many rows as it still allows."""
    widths = _widths(target.columns, group)
    if weight is not None:
        ranks = torch.stack([part.double().var(correction=0) for part in weight.split(group, dim=1)]).cpu()
    else:
        ranks = -torch.arange(len(widths)) if plan == "first" else spread(len(widths), mixture).long()
    budget = mixture.share * target.columns
    wide = _highest_ranked(ranks, widths, budget)
    left = ranks.double().masked_fill(wide, -torch.inf)
    if bool(wide.all()):
        return wide[None]
    following = int(left.argsort(descending=True, stable=True)[0])
    rows = int((budget - float(widths[wide].sum())) / float(widths[following]) * target.rows + 1e-6)
    if not rows:
        return wide[None]
    wide = wide.repeat(target.rows, 1)
    wide[:, following] = spread(target.rows, mixture._replace(share=rows / target.rows, stride=0))
    return wide


def spread(count: int, mixture: Mixture) -> Tensor:
    """EdgeRazor's interleave, bool [count]: which of `count` units of one size get the wider format.

    With a published share p it is every 1/p-th unit, beginning with the first. Any other share spreads
    `floor(p * count)` units evenly and so never exceeds its budget.
    """
    index = torch.arange(count)
    if mixture.stride:
        return index % mixture.stride == 0
    steps = (torch.arange(count + 1).double() * mixture.share + 1e-9).floor()
    return steps[1:] > steps[:-1]


def variances(weight: Tensor, group_size: int) -> Tensor:
    """Variance of the weights of each group, float64 [rows, groups] on the CPU, of a weight [rows, columns]."""
    parts = []
    for rows in weight.split(1024):  # float64 copies stay small
        groups = rows.double().split(group_size, dim=1)
        parts.append(torch.stack([group.var(dim=1, correction=0) for group in groups], dim=1).cpu())
    return torch.cat(parts)


def _highest_ranked(ranks: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """The units of highest rank whose sizes together fit the budget, bool [units]; of equal ranks the first ones."""
    order = ranks.argsort(descending=True, stable=True)
    fit = sizes[order].double().cumsum(0) <= budget + 1e-6
    wide = torch.zeros(len(sizes), dtype=torch.bool)
    wide[order[fit]] = True
    return wide


def _widths(columns: int, group: int) -> Tensor:
    """Columns of each group, int64 [groups]."""
    starts = torch.arange(0, columns, group)
    return (starts + group).clamp(max=columns) - starts


def plan_fields(wide: Tensor, mixture: Mixture) -> dict[str, Any]:
    """The choice of `choose` as fields of a `MatrixPlan`."""
    if bool(wide.all()) or not bool(wide.any()):
        return {"formats": (mixture.high if bool(wide.any()) else mixture.low,)}
    both = {"formats": (mixture.low, mixture.high)}
    if wide.dim() == 1 or wide.shape[1] == 1:
        return {**both, "row_formats": digits(wide)}
    text, groups = digits(wide), wide.shape[1]
    return {**both, "block_formats": tuple(text[at : at + groups] for at in range(0, len(text), groups))}
