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
from edgerazor.formats.core.least_error import Ladder, geometric

#: By bits: the more levels, the more a few thousandths of the scale decide which of them fit a group best.
LADDERS = {
    2: Ladder(geometric(0.85, 1.8, 6), spread=1.0, reaching=False),
    3: Ladder(geometric(0.3, 1.0, 12), spread=2.0, reaching=True),
    4: Ladder(geometric(0.42, 1.16, 15), spread=1.0, reaching=True),
    5: Ladder(geometric(0.64, 1.2, 22), spread=0.5, reaching=True),
    8: Ladder(geometric(0.97, 1.2, 52), spread=0.1, reaching=True),
}


class Absmax(Format):
    """The format `int<bits>` for 2 to 8 bits, or under another name."""

    def __init__(self, bits: int, name: str | None = None) -> None:
        self.name = name or f"int{bits}"
        self.nominal_bits = float(bits)
        self.code_bits = bits
        self.maximum = 2 ** (bits - 1) - 1
        self.minimum = -self.maximum
        self.ladder = LADDERS[bits]

    @property
    def min_code(self) -> int:
        """`-2^(b-1)`."""
        return self.minimum - 1

    def scale_rule(self, groups: Tensor) -> Tensor:
        """`max|w| / maximum` of each group: float32 [..., group] to float32 [...]."""
        return groups.abs().amax(dim=-1).div_(self.maximum)
