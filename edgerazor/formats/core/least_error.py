"""The scale of a group with nearly the least squared error, found from the group's weights alone.

With codes `q` at a scale, levels `l(q)`, `A = sum w l` and `B = sum l^2`, the best scale for these very codes is
`A / B`, and it leaves the error `sum w^2 - A^2 / B` (Lloyd's step, IEEE Trans. Inf. Theory 28(2), 1982). So the scales
of a grid are tried: fixed multiples of the group's root mean square, or of its absmax scale, at which the largest level
is the largest weight. The codes with the largest `A^2 / B` win and give the scale, which is refined in the same way.
The grid of a format is as fine as it takes to come within 1 % of the least error, for groups of 32 weights to whole
rows.

Every machine finds the same scales, in whatever order it adds: weights are measured in units, so that the largest of a
group is `RESOLUTION` units and all are whole numbers. Then all sums are sums of integers (of halves, for int2) that
float64 holds exactly, and float32 too for up to 16 summands. A scale is rounded to fp16 before it is tried. A group
that is all zero has the scale 0. The native library computes the same faster, equal to the bit
(`kernels/cpp/scale_search.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edgerazor.formats.core.base import Format

#: Largest finite fp16 number: a scale is never stored as infinity.
LARGEST_SCALE = 65504.0
#: Units in the largest weight of a group: 16 products of such a number and a level, at most 128, are exact in float32.
RESOLUTION = 8192
#: A group of weights below this has no better scale than 0: fp16 begins at 2^-24, and the smallest level is half of it.
SMALLEST_WEIGHT = 2.0**-26

#: Finds scales as `reference_search` does, and writes the codes that they give, int8 [..., group], where a tensor for
#: them is passed; None where it cannot search this format or these weights.
ScaleSearch = Callable[["Format", Tensor, Tensor | None], Tensor | None]
_accelerated: list[ScaleSearch] = []


class ScaleGrid(NamedTuple):
    """The scales that the search tries in each group: multiples of a base that follows from the group's weights.

    Attributes:
        multiples: of the base.
        rms_factor: the base is so many root mean squares of the group, unless the absmax scale is smaller.
        absmax: whether the base is at most the absmax scale, which then is tried, too.
        refinements: how many times the best scale is replaced by the best one for its codes.
    """

    multiples: tuple[float, ...]
    rms_factor: float
    absmax: bool
    refinements: int = 1


def geometric(first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` numbers from `first` to `last`, each in the same ratio to the one before."""
    return tuple(first * (last / first) ** (index / (count - 1)) for index in range(count))


def absmax_units(number_format: Format) -> float:
    """The absmax scale in units; 0 where the format's grid does without it."""
    return RESOLUTION / number_format.max_level if number_format.grid.absmax else 0.0


def use_scale_search(search: ScaleSearch) -> None:
    """Ask this search first from now on; what it finds must equal `reference_search` to the bit."""
    _accelerated[:] = [search]


def accelerated_search(number_format: Format, groups: Tensor, codes: Tensor | None = None) -> Tensor | None:
    """The result of the search that `use_scale_search` was given; None without one, or where it cannot."""
    return next((search(number_format, groups, codes) for search in _accelerated), None)


def reference_search(number_format: Format, groups: Tensor) -> Tensor:
    """The scales, float16 [...], of groups float32 [..., group], by the definition.

    Raises:
        ValueError: a weight is not finite.
    """
    largest = groups.abs().amax(-1)
    if not math.isfinite(largest.amax()):  # a NaN is the largest of all
        raise ValueError("a weight is not finite")
    unit = largest / RESOLUTION
    units_per_weight = (RESOLUTION / largest).masked_fill_(largest < SMALLEST_WEIGHT, 0)
    return _search(number_format, (groups * units_per_weight.unsqueeze(-1)).round_(), unit).half()


def _search(number_format: Format, groups: Tensor, unit: Tensor) -> Tensor:
    """Scales float32 [...] that fp16 holds, of groups float32 [..., group] in units float32 [...]."""
    grid, absmax = number_format.grid, absmax_units(number_format)
    base = (exact_sum(groups.square()) / groups.shape[-1]).sqrt_().float() * grid.rms_factor
    if absmax:
        base.clamp_(max=absmax)
    products = torch.zeros(unit.shape, dtype=torch.float64, device=unit.device)
    squares = torch.ones_like(products)

    def attempt(scale: Tensor) -> None:
        nonlocal products, squares
        new_products, new_squares = _sums(number_format, groups, unit, scale)
        better = new_products.square() * squares > products.square() * new_squares
        products = torch.where(better, new_products, products)
        squares = torch.where(better, new_squares, squares)

    def best() -> Tensor:
        return _round_to_fp16((products / squares).float() * unit)

    for multiple in grid.multiples:
        attempt(_round_to_fp16(base * multiple * unit))
    if absmax:
        attempt(_round_to_fp16(unit * absmax))
    for _ in range(grid.refinements):
        attempt(best())
    return best()


def _round_to_fp16(scale: Tensor) -> Tensor:
    """Scales rounded to fp16, as float32."""
    return scale.clamp(max=LARGEST_SCALE).half().float()


def _sums(number_format: Format, groups: Tensor, unit: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`sum w l` and `sum l^2`, float64 [...], of the codes at a scale; 0 and 1 where that is 0."""
    none = scale == 0
    ratios = groups * (unit / scale).masked_fill_(none, 0).unsqueeze(-1)
    levels = number_format.level_(number_format.round_to_code_(ratios, number_format.min_code))
    products = exact_sum(levels * groups).masked_fill_(none, 0)
    return products, exact_sum(levels.square_()).masked_fill_(none, 1).clamp_(min=torch.finfo(torch.float64).tiny)


def exact_sum(groups: Tensor) -> Tensor:
    """The sum of each group, float32 [..., group] to float64 [...]."""
    if groups.device.type != "cpu":
        return groups.sum(dim=-1, dtype=torch.float64)
    return groups.double().sum(dim=-1)  # a block is in the cache: faster than converting one by one
