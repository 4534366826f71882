"""The matrices of a packed folder in memory, where the kernels read them fastest.

Decoding a token reads every matrix once, in the same order, faster from huge pages by a fifth: so all of them are
copied once, in that order, into anonymous memory that asks for such pages (mappings of files get none). The copy costs
little, because checksums have to be computed anyway and the bytes are copied while they are in a core's cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.kernels import native
from edgerazor.kernels.memory import huge_memory
from edgerazor.packed import PackedModel, cores

#: Where tensors begin: lines of cache, and whole vectors.
ALIGNMENT = 64
TERNARY = "ternary"


def load_matrices(packed: PackedModel, names: Sequence[str], mapped: bool, expanded: bool) -> dict[str, native.Matrix]:
    """Matrices for the native kernels, their checksums and scales checked.

    Args:
        packed: where they are.
        names: of matrices whose formats are those of rows, in the order in which they are read.
        mapped: leave them in the mapped file.
        expanded: give ternary codes two bits each, where that is faster.

    Raises:
        UserError: one of them is damaged.
    """
    load = _load_mapped if mapped else _copying_loader(packed, names, expanded)

    def load_one(name: str) -> native.Matrix:
        try:
            return load(packed, name, expanded)
        except ValueError as error:
            raise UserError(f"{packed.folder}: {name}: {error}.", "Copy or pack the model again.") from None

    def weights(name: str) -> int:
        rows, columns = packed.header.matrices[name].shape
        return rows * columns

    threads = torch.get_num_threads()
    largest_first = sorted(names, key=weights, reverse=True)
    loaded: dict[str, native.Matrix] = {}
    with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            loaded = dict(zip(largest_first, pool.map(load_one, largest_first), strict=True))
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    return {name: loaded[name] if loaded else load_one(name) for name in names}  # one by one where there are no threads


def matrix_bytes(matrix: native.Matrix) -> int:
    """Bytes that a product with the matrix reads."""
    return sum(
        part.codes.nbytes + part.scales.nbytes + (0 if part.rows is None else part.rows.nbytes) for part in matrix.parts
    )


def _load_mapped(packed: PackedModel, name: str, expanded: bool) -> native.Matrix:
    matrix = native.Matrix(packed.parts(name), packed.spec(name), packed.header.matrices[name].shape)
    return matrix.expanded() if expanded else matrix


# In memory ----------------------------------------------------------------------------------------------------------


#: Part of codes of a matrix -> where it goes, its scales behind it: uint8 [bytes].
_Places: TypeAlias = dict[str, Tensor]


def _copying_loader(
    packed: PackedModel, names: Sequence[str], expanded: bool
) -> Callable[[PackedModel, str, bool], native.Matrix]:
    """Allocate memory for all matrices; returns the function that loads a matrix into its place there."""
    specs = {name: packed.spec(name) for name in names}
    places = _allocate({name: _sizes(specs[name], packed.header.matrices[name].shape, expanded) for name in names})

    def load(packed: PackedModel, name: str, expanded: bool) -> native.Matrix:
        if expanded and TERNARY in places[name]:
            return _copied_to(_load_mapped(packed, name, expanded), places[name], specs[name])
        parts = packed.copy_parts(name, places[name])
        return native.Matrix(parts, specs[name], packed.header.matrices[name].shape)

    return load


def _sizes(spec: MatrixSpec, shape: tuple[int, int], expanded: bool) -> dict[str, int]:
    """Bytes of the parts of codes, with their scales, as they will be in memory."""
    sizes = {part: math.prod(stored) for part, stored in formats.stored_shapes(spec, shape).items()}
    sizes.pop(formats.ROW_FORMATS, None)
    if expanded and TERNARY in sizes:
        layout = native.RowLayout(shape[1], spec.group_size, spec.group_size)
        blocks = formats.part_shapes(spec, shape)[TERNARY][1][0]
        sizes[TERNARY] = blocks * (layout.block_bytes(2) + 2 * native.ROWS * layout.groups)
    return sizes


def _allocate(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, _Places]:
    """Memory for the parts of all matrices, one behind the other in the order of their names."""
    starts, end = {}, 0
    for name, parts in sizes.items():
        for part, size in parts.items():
            starts[name, part] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
    memory = huge_memory(end)
    return {
        name: {part: memory[starts[name, part] :][:size] for part, size in parts.items()}
        for name, parts in sizes.items()
    }


def _copied_to(matrix: native.Matrix, places: _Places, spec: MatrixSpec) -> native.Matrix:
    """The matrix with its codes and scales copied to the given places."""
    for index, (number_format, _) in enumerate(spec.format_rows):
        place, part = places[number_format.name], matrix.parts[index]
        codes = place[: part.codes.nbytes].view(part.codes.shape)
        scales = place[part.codes.nbytes :][: part.scales.nbytes].view(torch.float16).view(part.scales.shape)
        codes.copy_(part.codes)
        scales.copy_(part.scales)
        matrix.parts[index] = dataclasses.replace(part, codes=codes, scales=scales)
    return matrix
