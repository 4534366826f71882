"""Ternary: every weight is -s, 0 or +s, about 1.58 bits (log2 3).

`s` is *twice the mean* of `|w|` over the group, so a weight is zeroed when it is smaller than the mean: for Gaussian
weights about 57 % of them. A multiplication by such a matrix needs no multiplications, only additions and subtractions
and one product with `s` per group. Source: EdgeRazor, arXiv 2605.04062, the "clip" rule.

Five codes make one byte, as digits of a number in base 3 (3^5 = 243 of 256 values are used, so 1.6 bits a weight).
The rule is not idempotent: encoding decoded weights again gives another scale. Encode once, keep the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.formats._base import Format

DIGITS = 5  # base-3 digits that a byte holds
LARGEST_BYTE = 3**DIGITS - 1


class Ternary(Format):
    """Codes -1, 0, 1."""

    name = "ternary"
    nominal_bits = 1.58  # by convention exactly this
    minimum, maximum = -1, 1

    def scale_rule(self, groups: Tensor) -> Tensor:
        """`2 * mean|w|` of each group: float32 [..., group] to float64 [...].

        The sum runs in float64, so that the order in which threads or vector units add does not show in fp16.
        """
        return groups.abs().sum(dim=-1, dtype=torch.float64).mul_(2 / groups.shape[-1])

    def packed_columns(self, cols: int) -> int:
        """Bytes of a packed row of `cols` codes."""
        return -(-cols // DIGITS)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes int8 [rows, cols] as uint8 [rows, ceil(cols / 5)]: byte = sum over i of (code_i + 1) * 3^i.

        A last byte with fewer than five codes is filled with codes 0.

        Raises:
            ValueError: a code is not -1, 0 or 1.
        """
        self.check_codes(codes)
        digits = torch.nn.functional.pad(codes, (0, -codes.shape[1] % DIGITS)).add_(1).to(torch.uint8)
        digits = digits.unflatten(1, (-1, DIGITS))
        packed = digits[..., DIGITS - 1].clone()
        for i in reversed(range(DIGITS - 1)):
            packed.mul_(3).add_(digits[..., i])
        return packed

    def unpack(self, packed: Tensor, cols: int) -> Tensor:
        """The inverse of `pack`: uint8 [rows, ceil(cols / 5)] as codes int8 [rows, cols].

        Raises:
            ValueError: the shape does not fit, a byte is above 242, or a filling code is not 0.
        """
        self.check_packed(packed, cols)
        if packed.numel() and packed.max() > LARGEST_BYTE:
            raise ValueError(f"a packed ternary byte is above {LARGEST_BYTE}")
        digits = [(packed // 3**i % 3).to(torch.int8).sub_(1) for i in range(DIGITS)]
        codes = torch.stack(digits, dim=2).flatten(1)
        if codes[:, cols:].any():
            raise ValueError("the filling codes at the end of a packed ternary row are not zero")
        return codes[:, :cols].contiguous()


FORMAT = Ternary()
