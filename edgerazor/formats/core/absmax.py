"""The absmax family: symmetric integers with a level at zero.

By the published rule the largest level lies on the largest weight of the group: with `b` bits the codes run from
`-(2^(b-1)-1)` to `2^(b-1)-1` (the lonely most negative code stays unused, so that `w` and `-w` are treated alike) and
`s = max|w| / (2^(b-1)-1)`: nothing is clipped, and one large weight makes its whole group coarse. Source: EdgeRazor,
arXiv 2605.04062, absmax quantization. A scale that does not follow from the largest weight (of least squared error, or
a learned one) uses the code `-2^(b-1)` too, as LSQ does (arXiv 1902.08153).
"""

from __future__ import annotations

from torch import Tensor

from edgerazor.formats.core.base import Format
from edgerazor.formats.core.least_error import ScaleGrid


class Absmax(Format):
    """Signed integers of 2 to 8 bits.

    Args:
        bits: width of a code.
        grid: the scales that the search of least squared error tries. The more levels, the more a few thousandths of
            the scale decide which of them fit a group best, so the finer the grid must be.
        name: `int<bits>` unless given.
    """

    def __init__(self, bits: int, grid: ScaleGrid, name: str | None = None) -> None:
        self.name = name or f"int{bits}"
        self.nominal_bits = float(bits)
        self.code_bits = bits
        self.max_code = 2 ** (bits - 1) - 1
        self.min_rule_code = -self.max_code
        self.grid = grid

    @property
    def min_code(self) -> int:
        """`-2^(b-1)`."""
        return self.min_rule_code - 1

    def scale_rule(self, groups: Tensor) -> Tensor:
        """`max|w| / max_code` of each group: float32 [..., group] to float32 [...]."""
        return groups.abs().amax(dim=-1).div_(self.max_code)
