"""Two-bit integers without a zero level: every weight is one of -3/2, -1/2, 1/2 or 3/2 times the scale.

The code `clip(floor(w / s), -2, 1)` stands for the level `code + 1/2`, in the middle of its interval; by the published
rule `s` is the mean of `|w|` over the group. All four values of the two bits are used, which counts more at this width
than having a zero (ParetoQ, arXiv 2502.02631, section 4, "stretched elastic" levels). `int2z` is the one with a zero.
"""

from __future__ import annotations

from torch import Tensor

from edgerazor.formats.core.base import Format, absolute_sum
from edgerazor.formats.core.least_error import ScaleGrid, geometric


class HalfOffset(Format):
    """Codes -2 to 1, levels -1.5 to 1.5."""

    name = "int2"
    nominal_bits = 2.0
    code_bits = 2
    min_rule_code, max_code = -2, 1
    rounding = "middle"
    grid = ScaleGrid(geometric(0.85, 1.2, 4), rms_factor=1.0, absmax=False)

    def scale_rule(self, groups: Tensor) -> Tensor:
        """`mean|w|` of each group: float32 [..., group] to float64 [...]."""
        return absolute_sum(groups).div_(groups.shape[-1])

    def round_to_code_(self, ratios: Tensor, min_code: int) -> Tensor:
        """The code of the interval that each ratio lies in."""
        return ratios.floor_().clamp_(min_code, self.max_code)

    def level_(self, codes: Tensor) -> Tensor:
        """The middle of each code's interval."""
        return codes.add_(0.5)


FORMAT = HalfOffset()
