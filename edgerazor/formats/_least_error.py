"""The scale of a group with nearly the least squared error, found from the group's weights alone.

With codes `q` at a scale, levels `l(q)`, `A = sum w l` and `B = sum l^2`, the best scale for these very codes is
`A / B`, and it leaves the error `sum w^2 - A^2 / B` (Lloyd's step, IEEE Trans. Inf. Theory 28(2), 1982). So the scales
of a ladder are tried, fixed shares of the group's root mean square or of the scale whose highest level is the largest
weight; the codes with the largest `A^2 / B` win and give the scale, which is refined in the same way. The ladder of a
format is as fine as it takes to come within 1 % of the least error, for groups of 32 weights to whole rows.

Scales are rounded to fp16 before they are tried. What is compared are float64 sums of products that float64 holds
exactly, so the order in which threads or vector units add does not show. A group that is all zero has the scale 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edgerazor.formats._base import Format

#: Largest finite fp16 number: a scale is never stored as infinity.
LARGEST_SCALE = 65504.0


class Ladder(NamedTuple):
    """The scales that are tried.

    Attributes:
        shares: of the base.
        spread: the base is at most this many root mean squares of the group.
        reaching: the base is at most the scale whose highest level is the largest weight, which is tried too.
        refinements: of the best.
    """

    shares: tuple[float, ...]
    spread: float
    reaching: bool
    refinements: int = 1


def geometric(first: float, last: float, count: int) -> tuple[float, ...]:
    """Numbers from first to last whose ratio is always the same."""
    return tuple(first * (last / first) ** (index / (count - 1)) for index in range(count))


def least_error_scales(number_format: Format, groups: Tensor) -> Tensor:
    """The scales, float16 [...], of groups float32 [..., group].

    Raises:
        ValueError: a weight is not finite.
    """
    found = _search(number_format, groups)
    if not math.isfinite(found.amax()):  # a NaN is the largest of all
        raise ValueError("a weight is not finite")
    return found.half()


def _search(number_format: Format, groups: Tensor) -> Tensor:
    """Scales float32 [...] that fp16 holds, of groups float32 [..., group]; NaN where one is not finite."""
    ladder, exact = number_format.ladder, groups.double()
    spread = (exact.square().sum(-1) / groups.shape[-1]).sqrt_().float()
    base = spread * ladder.spread
    reaching = groups.abs().amax(-1) / number_format.highest
    if ladder.reaching:
        base = torch.minimum(base, reaching)
    best, found = torch.zeros_like(base, dtype=torch.float64), torch.zeros_like(base)

    def attempt(scale: Tensor) -> None:
        nonlocal best, found
        products, squares = _sums(number_format, groups, exact, scale)
        explained = products * products / squares
        better = explained > best
        best = torch.where(better, explained, best)
        found = torch.where(better, _stored((products / squares).float()), found)

    for share in ladder.shares:
        attempt(_stored(base * share))
    if ladder.reaching:
        attempt(_stored(reaching))
    for _ in range(ladder.refinements):
        attempt(found)
    return found.masked_fill_(~torch.isfinite(spread), torch.nan)


def _stored(scale: Tensor) -> Tensor:
    """Rounded to fp16, as float32."""
    return scale.clamp(max=LARGEST_SCALE).half().float()


def _sums(number_format: Format, groups: Tensor, exact: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`sum w l` and `sum l^2`, float64 [...], of the codes at a scale; where that is 0, 0 and 1."""
    ratios = groups * (1 / scale).unsqueeze(-1)
    levels = number_format.level_(number_format.choose_(ratios, number_format.lowest)).double()
    none = scale == 0
    products = (levels * exact).sum(-1).masked_fill_(none, 0)
    return products, levels.square_().sum(-1).masked_fill_(none, 1).clamp_(min=torch.finfo(torch.float64).tiny)
