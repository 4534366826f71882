"""Ternary: every weight is -s, 0 or +s, about 1.58 bits (log2 3).

A weight is zeroed when it is smaller than `s / 2`. By the published rule `s` is *twice the mean* of `|w|` over the
group, so that about 57 % of Gaussian weights are zero (EdgeRazor, arXiv 2605.04062, the "clip" rule); the scale of
least squared error is smaller, and zeroes 46 % of them. A multiplication by such a matrix needs no multiplications,
only additions and subtractions and one product with `s` per group.

Five codes make one byte, as digits of a number in base 3 (3^5 = 243 of 256 values are used, so 1.6 bits a weight). Of
the 64 quads of a chunk (256 columns, the usual group) the four that are left share one more vector, two bits a code. Of
the five digits, the first four make r = t0 + 3 t1 + 9 t2 + 27 t3, at most 80. Where r < 64 the byte is 64 t4 + r, so
that a table of 64 entries finds the four by the low six bits, and the two high bits are t4; 192 + 17 t4 + (r - 64)
stands for the rest.
The published rule is not idempotent: encoding decoded weights again gives another scale. Encode once, keep the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.formats.core.base import Format, absolute_sum
from edgerazor.formats.core.layout import pack_bit_plane, repeat_byte, unpack_bit_plane
from edgerazor.formats.core.least_error import ScaleGrid, geometric

DIGITS = 5  # base-3 digits that a byte holds
LARGEST_BYTE = 3**DIGITS - 1


class Ternary(Format):
    """Codes -1, 0, 1."""

    name = "ternary"
    nominal_bits = 1.58  # by convention exactly this
    min_rule_code, max_code = -1, 1
    kernel_bits = 0  # what kernels call base 3
    grid = ScaleGrid(geometric(1.1, 2.6, 4), rms_factor=1.0, absmax=False, refinements=2)

    def scale_rule(self, groups: Tensor) -> Tensor:
        """`2 * mean|w|` of each group: float32 [..., group] to float64 [...]."""
        return absolute_sum(groups).mul_(2 / groups.shape[-1])

    # Codes <-> bytes: the eight bytes of a word at a time ------------------------------------------------------------

    chunk = 64
    code_bits = 2

    def chunk_vectors(self, quads: int) -> int:
        """One vector for every five quads, and one for the quads that are left, two bits a code."""
        return -(-quads // DIGITS)

    def pack_quads(self, words: Tensor) -> Tensor:
        """A chunk of quads, codes + 1 as words int64 [..., quads, 8], as vectors [..., chunk_vectors(quads), 8]."""
        whole = words.shape[-2] - words.shape[-2] % DIGITS
        t = words[..., :whole, :].unflatten(-2, (-1, DIGITS))
        r = t[..., 3, :] * 27
        for i, power in enumerate((1, 3, 9)):
            r += t[..., i, :] * power
        large = r + repeat_byte(128 - 64) >> 7 & repeat_byte(1)  # 1 where r >= 64
        t4 = t[..., 4, :]
        packed = r + (t4 << 6) - (t4 & large * 3) * (64 - 17) + (large << 7)
        if whole == words.shape[-2]:
            return packed
        return torch.cat([packed, pack_bit_plane(words[..., whole:, :], 0, 2, self.offset)], dim=-2)

    def unpack_quads(self, packed: Tensor, quads: int) -> Tensor:
        """The inverse of `pack_quads`: vectors [..., chunk_vectors(quads), 8] as words [..., quads, 8].

        Raises:
            ValueError: a byte of five digits is above 242, or a code that only fills up a vector is not 0.
        """
        count, rest = divmod(quads, DIGITS)
        five = packed[..., :count, :]
        if five.numel() and five.reshape(-1).view(torch.uint8).max() > LARGEST_BYTE:
            raise ValueError(f"a packed ternary byte is above {LARGEST_BYTE}")
        large = five >> 7 & five >> 6 & repeat_byte(1)  # 1 where the byte is 192 or more
        low = five & repeat_byte(63)
        t4 = (five >> 6 & repeat_byte(3)) - large * 3 + _reaches(low, 17, large) + _reaches(low, 34, large)
        r = low + large * 64 - (t4 & large * 3) * 17
        digits = []
        for power in (27, 9, 3):
            digit = _reaches(r, power) + _reaches(r, 2 * power)
            r = r - digit * power
            digits.append(digit)
        words = torch.stack([r, *reversed(digits), t4], dim=-2).flatten(-3, -2)
        if not rest:
            return words
        return torch.cat([words, unpack_bit_plane(packed[..., count:, :], rest, 2, self.offset)], dim=-2)


def _reaches(words: Tensor, bound: int, mask: Tensor | None = None) -> Tensor:
    """1 in each byte (below 128) that is at least `bound`, and where the mask is 1 if there is one."""
    reached = words + repeat_byte(128 - bound) >> 7 & repeat_byte(1)
    return reached if mask is None else reached & mask


FORMAT = Ternary()
