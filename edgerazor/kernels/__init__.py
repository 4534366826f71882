"""The multiplication by a packed matrix: one definition (`reference.py`) and, where they are built, faster twins of it.

This file chooses. The last implementation that the machine can run is the best, and the environment variable
`EDGERAZOR_ISA` asks for one by name:

- `integer`: the definition to the letter, integer sums within groups; slow, to compare with;
- `portable`: the native library in plain C++, for tests of it; slower than `reference` for many tokens;
- `reference`: decodes the matrix and multiplies in float32; the default where nothing faster is built;
- `avx2`, `avx2vnni`, `avx512`, `neon`, `i8mm`: the native library with the instructions of these names.

Native kernels compute with matrices as they are stored (`StoredMatrix`), on a CPU, and give the bits of `integer`, or
with 16-bit activations the numbers of `reference` up to the rounding of float32 sums. What they cannot take (formats of
blocks, other devices) is computed as by `reference`.

Importing this package also lets `formats` find scales of least squared error with the library, to the bit as without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor import registry
from edgerazor.formats import Encoded, Format, MatrixSpec, decode_matrix, use_scale_search
from edgerazor.kernels import native, reference
from edgerazor.kernels.reference import UNQUANTIZED, decoded_linear

__all__ = [
    "EXPANDED",
    "NOT_NATIVE",
    "UNQUANTIZED",
    "StoredMatrix",
    "decoded_linear",
    "embedding",
    "is_native",
    "linear",
    "name",
    "names",
    "note",
]

VARIABLE = "EDGERAZOR_ISA"

#: What to do where there is no library.
BUILD = "Build it (again) with `python -m edgerazor.kernels.build`; that needs a C++ compiler."

#: Names of implementations in Python.
NOT_NATIVE = ("integer", "reference")

#: Instruction sets for which decoding five base-3 digits takes longer than reading a byte in four of their 2-bit codes.
EXPANDED = ("avx2", "avx2vnni")

#: Products of numbers that a thread should have to do before another one is worth waking.
_PRODUCTS_PER_THREAD = 1 << 21
#: Weights of which a thread should have to find the scales.
_WEIGHTS_PER_THREAD = 1 << 15


class _Implementation(NamedTuple):
    linear: Callable[[Tensor, Encoded, MatrixSpec, Tensor | None, int, int, float | None], Tensor]
    embedding: Callable[[Tensor, Encoded, MatrixSpec], Tensor]


def _decode_and_multiply(
    x: Tensor,
    encoded: Encoded,
    spec: MatrixSpec,
    bias: Tensor | None,
    activation_bits: int,
    activation_group: int,
    activation_scale: float | None,
) -> Tensor:
    weight = decode_matrix(encoded, spec)
    return decoded_linear(x, weight, bias, activation_bits, activation_group, activation_scale)


_IMPLEMENTATIONS = {
    "integer": _Implementation(reference.linear, reference.embedding),
    "reference": _Implementation(_decode_and_multiply, reference.embedding),
}


def names() -> list[str]:
    """Names of the implementations that this machine can run, the best one last."""
    found = native.isas()
    return ["integer", *found[:1], "reference", *found[1:]]


def name() -> str:
    """Name of the implementation in use: the one that `EDGERAZOR_ISA` asks for, else the best.

    Raises:
        UserError: there is none of that name here.
    """
    wanted = os.environ.get(VARIABLE) or names()[-1]
    if wanted not in names():
        raise registry.unknown(f"kernel ({VARIABLE})", wanted, names())
    return wanted


def is_native() -> bool:
    """Whether the implementation in use is one of the native library."""
    return name() not in NOT_NATIVE


def note(used: str) -> str | None:
    """What to say of a model that computed with kernels of these names, if they are not as fast as they could be."""
    if "reference" not in used:
        return None
    slow = (
        "Reference kernels were used, which decode weights in PyTorch: sizes are real, speeds not what they could be. "
    )
    if is_native():
        return slow + "The native ones do not compute formats of blocks, and compute on CPUs alone."
    if native.library() is None:
        return f"{slow}{native.missing()[0].upper()}{native.missing()[1:]}. {BUILD}"
    if os.environ.get(VARIABLE):
        return slow + f"{VARIABLE} asks for them."
    return slow + "The native ones need AVX2, or an Arm processor with dot products."


def linear(
    x: Tensor,
    encoded: Encoded,
    spec: MatrixSpec,
    bias: Tensor | None = None,
    activation_bits: int = 8,
    activation_group: int = 256,
    activation_scale: float | None = None,
) -> Tensor:
    """`y = W x + bias`, float32 [..., out], for x [..., in]; see `reference.linear` for arguments and errors."""
    multiply = _of_codes().linear
    return multiply(x, encoded, spec, bias, activation_bits, activation_group, activation_scale)


def embedding(ids: Tensor, encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """Rows of a packed table, float32 [..., columns], for ids int64 [...]."""
    return _of_codes().embedding(ids, encoded, spec)


def _least_error(number_format: Format, groups: Tensor, codes: Tensor | None) -> Tensor | None:
    """Scales of least error by the native library, where it is in use, of groups that it takes."""
    if groups.device.type != "cpu" or number_format.rounding is None or not is_native():
        return None
    threads = max(1, min(torch.get_num_threads(), groups.numel() // _WEIGHTS_PER_THREAD))
    return native.least_error(number_format, groups, codes, native.isas().index(name()), threads)


use_scale_search(_least_error)


def _of_codes() -> _Implementation:
    """What computes with decoded codes: native kernels do not."""
    return _IMPLEMENTATIONS["reference" if is_native() else name()]


class StoredMatrix:
    """A packed matrix as it is stored, for the native kernels; nothing is decoded.

    Args:
        parts: as `formats.pack_matrix` gives them, in memory that stays (a mapped file).
        spec: formats of its rows.
        shape: rows and columns.

    Raises:
        ValueError: the formats are those of blocks, or a part does not fit or holds a scale that is not one.
    """

    def __init__(self, parts: Mapping[str, Tensor], spec: MatrixSpec, shape: tuple[int, int]) -> None:
        self._stored = native.Matrix(parts, spec, shape)
        self._expanded: native.Matrix | None = None

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation_bits: int,
        activation_group: int,
        activation_scale: float | None = None,
    ) -> Tensor:
        """`y = W x + bias`, float32 [..., out] without gradient, for x [..., in]; arguments as of `reference.linear`.

        The bits of `reference.linear`, but for 16-bit activations, where the order of float32 sums is another one. A
        token with a value that is not finite gives NaN, as in `decoded_linear`.
        """
        isa = native.isas().index(name())
        matrix = self._matrix(name())
        products = x.numel() * matrix.out
        threads = max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_THREAD))
        x = x.detach()
        if activation_bits == UNQUANTIZED:
            return matrix.linear_float(x, bias, isa, threads)
        how = (bias, activation_bits, activation_group, activation_scale, isa, threads)
        try:
            return matrix.linear(x, *how)
        except native.NotFiniteError:
            wrong = ~torch.isfinite(x.float()).all(-1, keepdim=True)
            return matrix.linear(x.masked_fill(wrong, 0), *how).masked_fill(wrong, torch.nan)

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, float32 [..., columns], for ids int64 [...]: the bits of `reference.embedding`."""
        return self._stored.embedding(ids)

    def _matrix(self, isa: str) -> native.Matrix:
        """The matrix in the codes that are fastest with these instructions."""
        if isa not in EXPANDED:
            return self._stored
        if self._expanded is None:
            self._expanded = self._stored.expanded()
        return self._expanded
