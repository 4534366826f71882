"""Signed block Hadamard rotation of the columns of a matrix, and of the inputs that it is multiplied with.

A few weights of a row and a few features of an input are often much larger than the rest, and the scale that they need
rounds the rest away. `R = diag(s) · blockdiag(H_b) / sqrt(b)` is orthogonal, so `(W R) (x R) = W x`, but every value of
`W R` and `x R` is a sum of b values with signs, which spreads what was large over the block (QuIP#, arXiv 2402.04396;
QuaRot, arXiv 2404.00456). Codes are then those of `W R`, and activations are rounded as `x R`.

- b, the block: the largest power of two that divides the number of columns, at most 512. An odd number of columns has
  blocks of 1: such a matrix is not rotated.
- H_b: the Hadamard matrix in Sylvester's (natural) order, `H_1 = [1]`, `H_2b = [[H_b, H_b], [H_b, -H_b]]`.
- s: a sign for each column, the same for all matrices of as many columns, since layers that share an input must rotate
  it alike. `seeded_signs` draws them; a packed model stores them.

The arithmetic is fixed to the bit, since native kernels have to repeat it before activations are rounded: float32
values, signs first, then additions and subtractions with strides 1, 2, 4 ... b/2, then one product with
`float32(1 / sqrt(b))`. The strides ascend because a SIMD register holds 8 or 16 neighbours: the first strides are
shuffles within a register, done where values are loaded and signs applied, and the same for every block; all later ones
add and subtract whole registers, and the last of them can be joined with the product and with finding the largest
magnitude, from which an activation's scale follows. No product comes between the additions, so nothing can be fused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Largest block: 32 registers of 16 numbers.
LARGEST_BLOCK = 512
#: Numbers that are transformed at a time, few enough to stay in a core's cache through all strides.
_CHUNK = 1 << 18

#: x [..., columns], its rotation, and whether it is rotated back -> float32 [..., columns], or None where it cannot.
Product = Callable[[Tensor, "Rotation", bool], Tensor | None]
_accelerated: list[Product] = []


def use_rotation_product(product: Product) -> None:
    """Ask this function first from now on; what it returns must equal what PyTorch computes here to the bit."""
    _accelerated[:] = [product]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of matrices of so many columns.

    Attributes:
        block: b, a power of two from 2 on that divides the number of columns.
        signs: s, int8 [columns], each 1 or -1.

    Raises:
        ValueError: the block or the signs are none.
    """

    block: int
    signs: Tensor

    def __post_init__(self) -> None:
        if problem := block_problem(self.block, len(self.signs)):
            raise ValueError(problem)
        if self.signs.dtype != torch.int8 or not bool((self.signs.abs() == 1).all()):
            raise ValueError("the signs of a rotation must be int8, each 1 or -1")

    @property
    def columns(self) -> int:
        """Number of columns, or of features of an input."""
        return len(self.signs)

    def equals(self, other: Rotation | None) -> bool:
        """Whether another rotation is the same one."""
        return other is not None and self.block == other.block and torch.equal(self.signs, other.signs)

    def rotate(self, x: Tensor) -> Tensor:
        """`x R`: rows of a weight or inputs of a linear layer, in the basis that codes are of.

        Args:
            x: floating [..., columns].

        Returns:
            float32 [..., columns]; the gradient is rotated back.
        """
        rotated: Tensor = _Rotate.apply(x, self, False)
        return rotated

    def rotate_back(self, x: Tensor) -> Tensor:
        """`x Rᵀ`, the inverse of `rotate` up to rounding: float32 [..., columns] for floating [..., columns]."""
        rotated: Tensor = _Rotate.apply(x, self, True)
        return rotated

    def signs_on(self, device: torch.device) -> Tensor:
        """The signs as float32 [columns] on a device."""
        if device not in self._signs:
            self._signs[device] = self.signs.to(device, torch.float32)
        return self._signs[device]

    @cached_property
    def sign_bits(self) -> Tensor:
        """The signs as they are stored, uint8 [bytes] on the CPU: see `pack_signs`."""
        return pack_signs(self.signs)

    @cached_property
    def _signs(self) -> dict[torch.device, Tensor]:
        return {}


class _Rotate(torch.autograd.Function):
    """Multiplication by R, or by its transpose; the gradient is multiplied by the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, back: bool) -> Tensor:
        ctx.rotation, ctx.back, ctx.dtype = rotation, back, x.dtype
        return _product(x, rotation, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradient, ctx.rotation, not ctx.back).to(ctx.dtype), None, None


def _product(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    if x.shape[-1] != rotation.columns:
        raise ValueError(f"the rotation has {rotation.columns} columns, but there are {x.shape[-1]}")
    for product in _accelerated:
        if (rotated := product(x, rotation, back)) is not None:
            return rotated
    signs = rotation.signs_on(x.device)
    if back:
        return hadamard_transform(x.float(), rotation.block).mul_(signs)
    return hadamard_transform(x.float() * signs, rotation.block)


def hadamard_transform(x: Tensor, block: int) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of each block of a row, to the bit as this file's head defines it.

    Args:
        x: float32 [..., n].
        block: power of two that divides n.

    Returns:
        float32 [..., n], a new tensor.
    """
    rows = x.reshape(-1, block)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    factor = torch.tensor(1 / math.sqrt(block), dtype=torch.float32).item()
    step = max(1, _CHUNK // block) if x.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        # Positions of a block lie in the first dimension, so that every stride adds long runs of numbers.
        values = rows[start : start + step].T.contiguous()
        sums = torch.empty_like(values)
        stride = 1
        while stride < block:
            pairs, results = (buffer.view(block // (2 * stride), 2, -1) for buffer in (values, sums))
            torch.add(pairs[:, 0], pairs[:, 1], out=results[:, 0])
            torch.sub(pairs[:, 0], pairs[:, 1], out=results[:, 1])
            values, sums, stride = sums, values, 2 * stride
        out[start : start + step].copy_(values.mul_(factor).T)  # PyTorch transposes fast only where it copies
    return out.view(x.shape)


def block_size(columns: int) -> int:
    """The block of matrices of so many columns; 1 where they are not rotated."""
    return min(columns & -columns, LARGEST_BLOCK)


def block_problem(block: int, columns: int) -> str:
    """Why matrices of so many columns cannot be rotated in such blocks; empty where they can."""
    if not 2 <= block <= LARGEST_BLOCK or block & (block - 1):
        return f"a block of a rotation must be a power of two from 2 to {LARGEST_BLOCK}, not {block}"
    return f"{columns} columns are no multiple of the block {block} of their rotation" if columns % block else ""


def find_rotation(name: str | None, columns: int) -> Rotation | None:
    """The rotation that a recipe calls by a name, of matrices of so many columns; None where there is none.

    Raises:
        ValueError: the name is another one than `hadamard`.
    """
    if name not in (None, "hadamard"):
        raise ValueError(f"there is no rotation called {name}")
    return hadamard(columns) if name else None


@cache
def hadamard(columns: int) -> Rotation | None:
    """The rotation by a signed block Hadamard matrix of so many columns; None where their number is odd."""
    block = block_size(columns)
    return None if block == 1 else Rotation(block, seeded_signs(columns))


def seeded_signs(columns: int) -> Tensor:
    """The signs of so many columns, int8 [columns]: the same ones always and everywhere.

    The bits are those of SHA-256 of the texts `edgerazor signs COLUMNS 0`, `edgerazor signs COLUMNS 1` and so on, one
    digest after the other, as `unpack_signs` reads them.
    """
    digests = (
        hashlib.sha256(f"edgerazor signs {columns} {number}".encode()).digest() for number in range(-(-columns // 256))
    )
    return _signs_of_bits(torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8), columns)


def _signs_of_bits(packed: Tensor, columns: int) -> Tensor:
    bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
    return 1 - 2 * bits.flatten()[:columns].to(torch.int8)


def sign_bytes(columns: int) -> int:
    """Bytes of the stored signs of so many columns."""
    return -(-columns // 8)


def pack_signs(signs: Tensor) -> Tensor:
    """Signs int8 [columns] as bits, uint8 [bytes]: 1 for -1, the first column in the lowest bit, zeros at the end."""
    bits = torch.zeros(8 * sign_bytes(len(signs)), dtype=torch.int64)
    bits[: len(signs)] = signs < 0
    return (bits.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_signs`: int8 [columns].

    Raises:
        ValueError: there are more or fewer bytes, or a bit behind the last column is not 0.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (sign_bytes(columns),):
        raise ValueError(f"the signs of {columns} columns must be {sign_bytes(columns)} bytes")
    signs = _signs_of_bits(packed, columns)
    if not torch.equal(pack_signs(signs), packed):
        raise ValueError("a bit behind the last sign is not 0")
    return signs
