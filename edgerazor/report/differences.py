"""What differs between two packed models: `edgerazor show A --against B`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from rich.console import RenderableType
from torch import Tensor

from edgerazor import formats
from edgerazor.console import Console, table
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.packed import Header, PackedMatrix, PackedModel, in_parallel

#: Weights that are decoded at a time.
BLOCK = 1 << 22


class MatrixDifference(BaseModel):
    """One matrix, in two models. Null is what cannot be compared, because shapes or group sizes differ."""

    name: str
    about: dict[str, tuple[Any, Any]] = Field(
        description="kind, shape, group size, weights by format: those that differ"
    )
    formats: float | None = Field(description="share of groups of weights that have another format")
    codes: float | None = Field(description="share of codes that differ")
    scales: float | None = Field(description="share of scales that differ")
    weights: float | None = Field(description="norm of the difference of the decoded weights, by the norm of the first")


class Differences(BaseModel):
    """Two packed models. `same`: they compute the same; how they are stored and made may differ."""

    folder: str
    against: str
    same: bool
    settings: dict[str, tuple[Any, Any]]
    rotations: dict[str, tuple[Any, Any]] = Field(
        description="columns -> block, and SHA-256 of the signs, of rotated matrices"
    )
    tied: dict[str, tuple[Any, Any]]
    provenance: dict[str, tuple[Any, Any]]
    compressed: tuple[bool, bool]
    equal_matrices: int
    matrices: list[MatrixDifference]
    others: dict[str, str] = Field(description="tensors that are not quantized and differ -> in what")
    only_in_folder: list[str] = Field(description="matrices")
    only_in_against: list[str] = Field(description="matrices")


def compare(folder: Path, against: Path, console: Console, verify: bool = False) -> Differences:
    """Find what differs; matrices whose recorded digests are equal are not read, unless everything is verified.

    Raises:
        UserError: one of them is damaged.
    """
    first, second = PackedModel.open(folder), PackedModel.open(against)
    a, b = first.header, second.header
    if verify:
        with console.track("verify", len(a.matrices) + len(b.matrices)) as tracker:
            first.verify(tracker.advance)
            second.verify(tracker.advance)
    shared = a.matrices.keys() & b.matrices.keys()
    changed = [name for name in sorted(shared) if _identity(a, name) != _identity(b, name)]
    differences: dict[str, MatrixDifference] = {}

    def work(name: str) -> None:
        differences[name] = _compare(first.matrix(name), second.matrix(name))

    with console.track("compare", len(changed)) as tracker:
        tasks = [(2 * math.prod(a.matrices[name].shape), functools.partial(work, name)) for name in changed]
        in_parallel(tasks, tracker.advance)
    others = _others(first, second)
    only_a, only_b = sorted(a.matrices.keys() - shared), sorted(b.matrices.keys() - shared)
    settings, tied = _unequal(a.settings, b.settings), _unequal(a.tied, b.tied)
    rotations = _unequal(*({columns: _rotation(header, columns) for columns in header.rotations} for header in (a, b)))
    return Differences(
        folder=str(folder),
        against=str(against),
        same=not (changed or others or only_a or only_b or settings or rotations or tied),
        settings=settings,
        rotations=rotations,
        tied=tied,
        provenance=_unequal(_flat(a.provenance), _flat(b.provenance)),
        compressed=(a.compression is not None, b.compression is not None),
        equal_matrices=len(shared) - len(changed),
        matrices=[differences[name] for name in changed],
        others=others,
        only_in_folder=only_a,
        only_in_against=only_b,
    )


def _others(first: PackedModel, second: PackedModel) -> dict[str, str]:
    """Tensors that are not quantized and differ, and in what."""
    a, b = first.header.others, second.header.others
    unequal = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if not unequal:
        return {}
    tensors = first.others(), second.others()
    return {name: _difference(*(others.get(name) for others in tensors)) for name in unequal}


def _difference(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return f"only in {'the other' if a is None else 'the first'}"
    if a.shape != b.shape:
        return f"shape {list(a.shape)} | {list(b.shape)}"
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in (a, b)]
    what = "" if a.dtype == b.dtype else f"{' | '.join(names)}, "
    return what + ("equal numbers" if torch.equal(a.double(), b.double()) else "other numbers")


def _identity(header: Header, name: str) -> tuple[str, str, tuple[int, str] | None]:
    """What decides about decoded weights, and what they are for."""
    entry = header.matrices[name]
    return entry.kind, entry.digest, _rotation(header, str(entry.shape[1]))


def _rotation(header: Header, columns: str) -> tuple[int, str] | None:
    """Block, and SHA-256 of the signs, of the rotation of matrices of so many columns; None where there is none."""
    return (header.rotations[columns], header.signs[columns]) if columns in header.rotations else None


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`{"recipe": {"seed": 1}}` as `{"recipe.seed": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def _compare(a: PackedMatrix, b: PackedMatrix) -> MatrixDifference:
    shapes = tuple((int(m.encoded.codes.shape[0]), int(m.encoded.codes.shape[1])) for m in (a, b))
    unequal = _unequal(_properties(a, shapes[0]), _properties(b, shapes[1]))
    fits = shapes[0] == shapes[1]
    grouped = fits and a.encoded.scales.shape == b.encoded.scales.shape
    return MatrixDifference(
        name=a.name,
        about=unequal,
        formats=_share(_format_map(a.spec, shapes[0]) != _format_map(b.spec, shapes[1])) if grouped else None,
        codes=_share(a.encoded.codes != b.encoded.codes) if fits else None,
        scales=_share(a.encoded.scales != b.encoded.scales) if grouped else None,
        weights=_relative(a, b) if fits else None,
    )


def _properties(matrix: PackedMatrix, shape: tuple[int, int]) -> dict[str, Any]:
    return {
        "kind": matrix.kind,
        "shape": list(shape),
        "group size": min(matrix.spec.group_size, shape[1]),
        "formats": matrix.spec.weights_by_format(shape),
        "rotation in blocks of": matrix.spec.rotation.block if matrix.spec.rotation else None,
    }


def _share(differs: Tensor) -> float:
    return float(differs.sum()) / differs.numel()


def _format_map(spec: MatrixSpec, shape: tuple[int, int]) -> Tensor:
    """Index of the format of each group of each row in the list of all, uint8 [rows, groups]."""
    number = torch.tensor([formats.names().index(name) for name in spec.formats], dtype=torch.uint8)
    groups = formats.group_count(shape[1], spec.group_size)
    if spec.block_formats is not None:
        return number[spec.block_formats.long()].expand(shape[0], groups)
    rows = torch.zeros(shape[0], dtype=torch.uint8) if spec.row_formats is None else spec.row_formats
    return number[rows.long()][:, None].expand(shape[0], groups)


def _relative(a: PackedMatrix, b: PackedMatrix) -> float:
    """|A - B| / |A| of decoded weights, some rows at a time, in float64."""
    height = max(1, BLOCK // a.encoded.codes.shape[1])
    difference = norm = 0.0
    for rows in torch.arange(len(a.encoded.codes)).split(height):
        w, v = (
            matrix.spec.rotate_back(
                formats.decode_matrix(
                    Encoded(matrix.encoded.codes[rows], matrix.encoded.scales[rows]), matrix.spec.take(rows)
                )
            ).double()
            for matrix in (a, b)
        )
        difference, norm = difference + float((w - v).square().sum()), norm + float(w.square().sum())
    return math.sqrt(difference / norm) if norm else float(difference > 0)


def show(result: Differences) -> list[RenderableType]:
    """What differs, for people."""
    lines: list[RenderableType] = []
    unequal = {"settings": result.settings, "tied": result.tied, "provenance": result.provenance}
    for title, pairs in unequal.items():
        lines += [f"{title}, {name}: {_word(a)} | {_word(b)}" for name, (a, b) in pairs.items()]
    for columns, blocks in result.rotations.items():
        words = (f"in blocks of {block[0]}, signs {block[1][:8]}" if block else "none" for block in blocks)
        lines.append(f"rotation of {columns} columns: {' | '.join(words)}")
    for where, names in ((result.folder, result.only_in_folder), (result.against, result.only_in_against)):
        lines += [f"only in {where}: {name}" for name in names]
    lines += [f"{name}: {what}" for name, what in result.others.items()]
    if result.compressed[0] != result.compressed[1]:
        lines.append(f"compressed: {' | '.join('yes' if compressed else 'no' for compressed in result.compressed)}")
    if result.matrices:
        rows = [
            [matrix.name, *map(_share_text, (matrix.formats, matrix.codes, matrix.scales, matrix.weights))]
            for matrix in result.matrices
        ]
        caption = (
            f"shares of groups, codes and scales; weights: |A - B| / |A|; {result.equal_matrices} others are equal"
        )
        lines.append(table("Matrices that differ", ["matrix", "formats", "codes", "scales", "weights"], rows, caption))
        for matrix in result.matrices:
            lines += [f"{matrix.name}, {what}: {_word(a)} | {_word(b)}" for what, (a, b) in matrix.about.items()]
    if result.same:
        lines.append(
            f"no difference: {result.equal_matrices} matrices and all other tensors of {result.folder} and "
            f"{result.against} are equal"
        )
    return lines


def _word(value: Any) -> str:
    return ", ".join(f"{key} {item:,}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
