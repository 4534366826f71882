"""Products with packed matrices: one definition (`reference.py`), and faster implementations where they are built.

This file chooses the implementation. The last one of `names` is the best that the machine can run, and the environment
variable `EDGERAZOR_ISA` selects one by name:

- `integer`: the definition to the letter, integer sums within segments; slow, for comparison;
- `portable`: the native library in plain C++, for tests of it; slower than `reference` for many tokens;
- `reference`: dequantizes the matrix and multiplies in float32; the default where nothing faster is built;
- `avx2`, `avx2vnni`, `avx512`, `neon`, `i8mm`: the native library with the instruction set of that name.

Native kernels compute with matrices in their stored layout (`StoredMatrix`), on a CPU. They give the bits of `integer`
or, with 16-bit activations, the numbers of `reference` up to the rounding of float32 sums. What they do not support
(formats of blocks, other devices) is computed by `reference`.

Importing this package also lets `formats` find scales of least squared error and rotate with the library, which gives
the same bits. `README.md` beside this file explains how the native library works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from edgerazor import registry
from edgerazor.formats import (
    Encoded,
    Format,
    MatrixSpec,
    Rotation,
    decode_matrix,
    use_learned_kernels,
    use_rotation_product,
    use_scale_search,
)
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
    "shapes_only",
]

VARIABLE = "EDGERAZOR_ISA"

#: Advice where there is no library.
BUILD = "Build it (again) with `python -m edgerazor.kernels.build`; that needs a C++ compiler."

_only_shapes = ContextVar("only_shapes", default=False)

#: Names of the implementations in Python.
NOT_NATIVE = ("integer", "reference")

#: Instruction sets with which it takes longer to unpack base-3 digits than to read 2-bit codes, a fourth more bytes.
EXPANDED = ("avx2", "avx2vnni")

#: Multiplications that each thread should have before another one is woken.
_MULTIPLICATIONS_PER_THREAD = 1 << 21
#: Weights that each thread should have in a search for scales.
_WEIGHTS_PER_THREAD = 1 << 15
#: Weights that each thread should have to round with trained scales.
_ROUNDED_PER_THREAD = 1 << 18
#: Numbers that each thread should have to rotate.
_ROTATED_PER_THREAD = 1 << 18


class _Implementation(NamedTuple):
    linear: Callable[[Tensor, Encoded, MatrixSpec, Tensor | None, int, int, float | None], Tensor]
    embedding: Callable[[Tensor, Encoded, MatrixSpec], Tensor]


def _dequantize_and_multiply(
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
    "reference": _Implementation(_dequantize_and_multiply, reference.embedding),
}


def names() -> list[str]:
    """Names of the implementations that this machine can run, the best one last."""
    isas = native.isas()
    return ["integer", *isas[:1], "reference", *isas[1:]]


def name() -> str:
    """Name of the implementation in use: the one that `EDGERAZOR_ISA` selects, else the best.

    Raises:
        UserError: this machine has no implementation of that name.
    """
    selected = os.environ.get(VARIABLE) or names()[-1]
    if selected not in names():
        raise registry.unknown(f"kernel ({VARIABLE})", selected, names())
    return selected


def is_native() -> bool:
    """Whether the implementation in use belongs to the native library."""
    return not _only_shapes.get() and name() not in NOT_NATIVE


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, tensors have no data (PyTorch's fake tensors): none is handed to the native library, none rotated."""
    token = _only_shapes.set(True)
    try:
        yield
    finally:
        _only_shapes.reset(token)


def note(used: str) -> str | None:
    """A note about a model that computed with the kernels `used`, if they are not the fastest possible; else None."""
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
    return _for_encoded().linear(x, encoded, spec, bias, activation_bits, activation_group, activation_scale)


def embedding(ids: Tensor, encoded: Encoded, spec: MatrixSpec) -> Tensor:
    """Rows of an encoded embedding, float32 [..., columns], for ids int64 [...]."""
    return _for_encoded().embedding(ids, encoded, spec)


def _least_error(number_format: Format, groups: Tensor, codes: Tensor | None) -> Tensor | None:
    """Scales of least error by the native library, or None where it is not in use or does not support the groups."""
    if groups.device.type != "cpu" or number_format.rounding is None or not is_native():
        return None
    threads = max(1, min(torch.get_num_threads(), groups.numel() // _WEIGHTS_PER_THREAD))
    return native.least_error(number_format, groups, codes, native.isas().index(name()), threads)


use_scale_search(_least_error)


def _rotated(x: Tensor, rotation: Rotation, back: bool) -> Tensor | None:
    """x rotated, or rotated back, by the native library, or a shape for a shape; None where neither is asked for."""
    if _only_shapes.get():
        return torch.empty(x.shape, device=x.device)  # dozens of sums of a shape take a minute in a large model
    if x.device.type != "cpu" or not is_native():
        return None
    threads = max(1, min(torch.get_num_threads(), x.numel() // _ROTATED_PER_THREAD))
    return native.rotate(x, rotation, back, native.isas().index(name()), threads)


use_rotation_product(_rotated)


def _rounded(w: Tensor, scales: Tensor, spec: MatrixSpec, dtype: torch.dtype) -> Tensor | None:
    """A weight rounded with trained scales by the native library; None where it is not in use or cannot."""
    if dtype not in (torch.float32, torch.bfloat16) or not _learned_natively(w, spec):
        return None
    return native.round_weights(w, scales, spec, dtype, native.isas().index(name()), _threads_for(w))


def _gradients(gradient: Tensor, w: Tensor, scales: Tensor, spec: MatrixSpec) -> tuple[Tensor, Tensor] | None:
    """LSQ's gradients by the native library; None where it is not in use or cannot."""
    if gradient.dtype != torch.float32 or not _learned_natively(w, spec):
        return None
    return native.learned_gradients(gradient, w, scales, spec, native.isas().index(name()), _threads_for(w))


def _learned_natively(w: Tensor, spec: MatrixSpec) -> bool:
    """Whether the native library is in use and rounds such a weight with trained scales."""
    known = w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() and spec.block_formats is None
    return known and is_native() and all(number_format.rounding for number_format, _ in spec.format_rows)


def _threads_for(w: Tensor) -> int:
    """Among how many threads a weight is shared out."""
    return max(1, min(torch.get_num_threads(), w.numel() // _ROUNDED_PER_THREAD))


use_learned_kernels(_rounded, _gradients)


def _for_encoded() -> _Implementation:
    """The implementation for codes in tensors, which native kernels do not support."""
    return _IMPLEMENTATIONS["reference" if is_native() else name()]


class StoredMatrix:
    """A packed matrix in its stored layout, for the native kernels; nothing is unpacked.

    Args:
        parts: tensors by name, as `formats.pack_matrix` returns them, in memory that stays (a mapped file).
        spec: the formats of its rows.
        shape: rows and columns.

    Raises:
        ValueError: the formats are those of blocks, or a part does not fit, or a scale is negative or not finite.
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
        """`y = W x + bias`, float32 [..., out] without gradient, for x [..., in]; arguments as for `reference.linear`.

        It gives the bits of `reference.linear`, except that 16-bit activations are summed up in another order. A token
        with a value that is not finite gives NaN, as in `decoded_linear`.
        """
        isa = native.isas().index(name())
        matrix = self._matrix(name())
        multiplications = x.numel() * matrix.out
        threads = max(1, min(torch.get_num_threads(), multiplications // _MULTIPLICATIONS_PER_THREAD))
        x = x.detach()
        if activation_bits == UNQUANTIZED:
            return matrix.linear_float(x, bias, isa, threads)
        arguments = (bias, activation_bits, activation_group, activation_scale, isa, threads)
        try:
            return matrix.linear(x, *arguments)
        except native.NotFiniteError:
            not_finite = ~torch.isfinite(x.float()).all(-1, keepdim=True)
            return matrix.linear(x.masked_fill(not_finite, 0), *arguments).masked_fill(not_finite, torch.nan)

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, float32 [..., columns], for ids int64 [...]: the bits of `reference.embedding`."""
        return self._stored.embedding(ids)

    def _matrix(self, isa: str) -> native.Matrix:
        """The matrix in the codes that are fastest with this instruction set."""
        if isa not in EXPANDED:
            return self._stored
        if self._expanded is None:
            self._expanded = self._stored.expanded()
        return self._expanded
