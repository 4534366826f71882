"""The scale of a group with nearly the least squared error, found from the group's weights alone.

With codes `q` at a scale, levels `l(q)`, `A = sum w l` and `B = sum l^2`, the best scale for these very codes is
`A / B`, and it leaves the error `sum w^2 - A^2 / B` (Lloyd's step, IEEE Trans. Inf. Theory 28(2), 1982). So the scales
of a ladder are tried, fixed shares of the group's root mean square or of the scale whose highest level is the largest
weight; the codes with the largest `A^2 / B` win and give the scale, which is refined in the same way. The ladder of a
format is as fine as it takes to come within 1 % of the least error, for groups of 32 weights to whole rows.

Every machine finds the same scales, in whatever order it adds: weights are measured in whole units, the largest of a
group is `RESOLUTION` of them, so that sums are sums of integers (of halves, for int2) that float64 holds exactly, and
float32 as long as there are no more than 16 of them. A scale is rounded to fp16 before it is tried. A group that is
all zero has the scale 0. What the native library computes faster is this, to the bit (`kernels/cpp/scale_search.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edgerazor.formats._base import Format

#: Largest finite fp16 number: a scale is never stored as infinity.
LARGEST_SCALE = 65504.0
#: Units in the largest weight of a group: 16 products of such a number and a level, at most 128, are exact in float32.
RESOLUTION = 8192
#: A group of weights below this has no better scale than 0: fp16 begins at 2^-24, and the lowest level is half of it.
SMALLEST_WEIGHT = 2.0**-26

#: Finds scales as `reference` does, and writes the codes that they choose, int8 [..., group], if asked to; or
#: gives None where it cannot.
Search = Callable[["Format", Tensor, Tensor | None], Tensor | None]
_faster: list[Search] = []


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


def reaching_units(number_format: Format) -> float:
    """The scale whose highest level is the largest weight of the group, in units; 0 where the ladder ignores it."""
    return RESOLUTION / number_format.highest if number_format.ladder.reaching else 0.0


def search_with(search: Search) -> None:
    """From now on this is asked first; what it finds must be the same to the bit."""
    _faster[:] = [search]


def faster(number_format: Format, groups: Tensor, codes: Tensor | None = None) -> Tensor | None:
    """What is found elsewhere, if there is something that can; the arguments of `Search`."""
    return next((search(number_format, groups, codes) for search in _faster), None)


def reference(number_format: Format, groups: Tensor) -> Tensor:
    """The scales, float16 [...], of groups float32 [..., group], by the definition.

    Raises:
        ValueError: a weight is not finite.
    """
    largest = groups.abs().amax(-1)
    if not math.isfinite(largest.amax()):  # a NaN is the largest of all
        raise ValueError("a weight is not finite")
    unit = largest / RESOLUTION
    units = (RESOLUTION / largest).masked_fill_(largest < SMALLEST_WEIGHT, 0)
    return _search(number_format, (groups * units.unsqueeze(-1)).round_(), unit).half()


def _search(number_format: Format, groups: Tensor, unit: Tensor) -> Tensor:
    """Scales float32 [...] that fp16 holds, of groups float32 [..., group] in units float32 [...]."""
    ladder, reaching = number_format.ladder, reaching_units(number_format)
    base = (exact_sum(groups.square()) / groups.shape[-1]).sqrt_().float() * ladder.spread
    if reaching:
        base.clamp_(max=reaching)
    products = torch.zeros(unit.shape, dtype=torch.float64, device=unit.device)
    squares = torch.ones_like(products)

    def attempt(scale: Tensor) -> None:
        nonlocal products, squares
        new_products, new_squares = _sums(number_format, groups, unit, scale)
        better = new_products.square() * squares > products.square() * new_squares
        products = torch.where(better, new_products, products)
        squares = torch.where(better, new_squares, squares)

    def found() -> Tensor:
        return _stored((products / squares).float() * unit)

    for share in ladder.shares:
        attempt(_stored(base * share * unit))
    if reaching:
        attempt(_stored(unit * reaching))
    for _ in range(ladder.refinements):
        attempt(found())
    return found()


def _stored(scale: Tensor) -> Tensor:
    """Rounded to fp16, as float32."""
    return scale.clamp(max=LARGEST_SCALE).half().float()


def _sums(number_format: Format, groups: Tensor, unit: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`sum w l` and `sum l^2`, float64 [...], of the codes at a scale; 0 and 1 where that is 0."""
    none = scale == 0
    ratios = groups * (unit / scale).masked_fill_(none, 0).unsqueeze(-1)
    levels = number_format.level_(number_format.choose_(ratios, number_format.lowest))
    products = exact_sum(levels * groups).masked_fill_(none, 0)
    return products, exact_sum(levels.square_()).masked_fill_(none, 1).clamp_(min=torch.finfo(torch.float64).tiny)


def exact_sum(groups: Tensor) -> Tensor:
    """The sum of each group, float32 [..., group] to float64 [...]."""
    if groups.device.type != "cpu":
        return groups.sum(dim=-1, dtype=torch.float64)
    return groups.double().sum(dim=-1)  # of a block in the cache: faster than converting one by one
