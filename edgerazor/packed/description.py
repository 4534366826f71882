"""The header as it is stored: short JSON in the first file, and a tensor of all checksums.

Most matrices of a model have one description, and a checksum cannot be written shorter than its bytes. So the JSON has
each description once, with the names of all matrices that it holds for, and the SHA-256 of the tensor of checksums in
place of the checksums.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from edgerazor import formats, untrusted
from edgerazor.errors import UserError
from edgerazor.packed.container import damaged_model, sha256
from edgerazor.packed.header import (
    SHA256_BYTES,
    VERSION,
    Compression,
    Header,
    Kind,
    MatrixEntry,
    ModelFields,
    Strict,
    TensorEntry,
    header_problem,
    in_columns_order,
    signs_name,
)
from edgerazor.packed.names import fold, unfold

HEADER_KEY, HEADER_SUM_KEY = "edgerazor", "edgerazor_sha256"


class _Matrices(Strict):
    """Matrices of one description: fields of `MatrixEntry`, names of parts, and folded names of the matrices."""

    kind: Kind
    formats: tuple[str, ...] = Field(min_length=1)
    group_size: int = Field(ge=1)
    shape: tuple[int, int]
    parts: tuple[str, ...] = Field(min_length=1)
    names: tuple[str, ...]


class _Others(Strict):
    """Tensors of one dtype and shape that are not quantized, with their folded names."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]


class Description(ModelFields):
    """The JSON of a header. `sha256` is that of the tensor of checksums."""

    matrices: tuple[_Matrices, ...]
    others: tuple[_Others, ...]
    sha256: str


_Group = TypeVar("_Group", _Matrices, _Others)


# Writing ----------------------------------------------------------------------------------------------------------


def header_metadata(header: Header) -> dict[str, str]:
    """The metadata of the first weight file, which hold the header.

    Raises:
        ValueError: one of its names looks like a range of names.
    """
    described = Description(
        **{name: getattr(header, name) for name in ModelFields.model_fields},
        matrices=tuple(_grouped_matrices(header)),
        others=tuple(_grouped_others(header)),
        sha256=sha256([formats.tensor_bytes(checksums(header))]),
    )
    left_out = {name for name in ("compression", "rotations") if not getattr(header, name)}
    values = described.model_dump(mode="json", exclude=left_out)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {HEADER_KEY: text, HEADER_SUM_KEY: sha256([memoryview(text.encode())])}


def _grouped_matrices(header: Header) -> Iterator[_Matrices]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in header.matrices.items():
        description = (entry.kind, entry.formats, entry.group_size, entry.shape, tuple(entry.sha256))
        groups.setdefault(description, []).append(name)
    for (kind, number_formats, group_size, shape, parts), names in groups.items():
        yield _Matrices(
            kind=kind,
            formats=number_formats,
            group_size=group_size,
            shape=shape,
            parts=parts,
            names=tuple(fold(names)),
        )


def _grouped_others(header: Header) -> Iterator[_Others]:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, entry in header.others.items():
        groups.setdefault((entry.dtype, entry.shape), []).append(name)
    for (dtype, shape), names in groups.items():
        yield _Others(dtype=dtype, shape=shape, names=tuple(fold(names)))


def checksums(header: Header) -> Tensor:
    """All digests and checksums, uint8 [n, 32].

    First those of each matrix, its digest and then the checksums of its parts, then the checksum of each other tensor.
    Matrices and tensors are in the order of their names, parts in the order of the description's list. Last come those
    of the signs of rotations, by their numbers of columns.
    """
    sums: list[str] = []
    for entry in header.matrices.values():
        sums += [entry.digest, *entry.sha256.values()]
    sums += (entry.sha256 for entry in header.others.values())
    sums += (header.signs[columns] for columns in in_columns_order(header.signs))
    return torch.frombuffer(bytearray.fromhex("".join(sums)), dtype=torch.uint8).view(-1, SHA256_BYTES)


# Reading ----------------------------------------------------------------------------------------------------------


def read_header(
    path: Path, metadata: Mapping[str, str], stored: Collection[str], read_checksums: Callable[[int], Tensor]
) -> Header:
    """The header in the metadata of the first weight file.

    Args:
        path: the file.
        metadata: of the file.
        stored: names of all stored tensors.
        read_checksums: gives the tensor of so many checksums, uint8 [n, 32].

    Raises:
        UserError: it is missing, damaged, contradicts itself, or is of a later version.
    """
    described = _read_description(path, metadata)
    try:
        if any(len(set(group.parts)) < len(group.parts) for group in described.matrices):
            raise ValueError("a list of parts repeats one")
        matrices = _named(described.matrices, lambda name, group: _tensors(described, name, group), stored)
        others = _named(described.others, lambda name, _: [name], stored)
        _check_rotations(described, stored)
        count = sum(1 + len(group.parts) for group in matrices.values()) + len(others) + len(described.rotations)
        sums = read_checksums(count)
        if sha256([formats.tensor_bytes(sums)]) != described.sha256:
            raise ValueError("its checksums do not have the recorded checksum")
        header = _header(described, matrices, others, sums)
        problem = header_problem(header)
    except ValueError as error:
        raise damaged_model(path, str(error)) from None
    if problem:
        raise damaged_model(path, problem)
    return header


def _read_description(path: Path, metadata: Mapping[str, str]) -> Description:
    text = metadata.get(HEADER_KEY)
    if text is None:
        raise damaged_model(path, f"it has no {HEADER_KEY} header")
    try:
        raw = untrusted.parse_json(text, unambiguous=True)
    except ValueError as error:
        raise damaged_model(path, f"its header is not JSON ({error})") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if sha256([memoryview(text.encode())]) != metadata.get(HEADER_SUM_KEY):
        raise damaged_model(path, "its header does not have the recorded checksum")
    if type(version) not in (int, type(None)):
        raise damaged_model(path, f"its version is {version!r}, which is no whole number")
    if isinstance(version, int) and not 1 <= version <= VERSION:
        raise UserError(
            f"{path} has version {version} of the packed format, but this program reads versions 1 to {VERSION}.",
            "Install a newer edgerazor." if version > VERSION else "Pack the model again.",
        )
    _check_compression(path, raw)
    try:
        return Description.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "too deeply nested"}
        place = ".".join(str(step) for step in first["loc"])
        raise damaged_model(path, f"its header is wrong at {place or 'the top'} ({first['msg']})") from None


def _check_compression(path: Path, raw: Any) -> None:
    """Refuse an unknown compression by its name, rather than as damage."""
    compression = raw.get("compression") if isinstance(raw, dict) else None
    known = Compression().model_dump()
    if isinstance(compression, dict) and compression.keys() == known.keys() and compression != known:
        described = ", ".join(f"{key} {value!r:.40}" for key, value in sorted(compression.items()))
        raise UserError(
            f"{path} is compressed in a way that this program does not know ({described}).",
            "Install a newer edgerazor.",
        )


def _check_rotations(described: Description, stored: Collection[str]) -> None:
    """ValueError unless rotations are of plain numbers of columns, and their signs are stored."""
    for columns in described.rotations:
        if not (columns.isascii() and columns.isdecimal() and len(columns) < 20 and str(int(columns)) == columns):
            raise ValueError(f"{columns:.50} is no number of columns of a rotation")
        if signs_name(columns) not in stored:
            raise ValueError(f"the tensor {signs_name(columns)} is missing")


def _tensors(described: Description, name: str, group: _Matrices) -> list[str]:
    """Names of the tensors that hold a matrix."""
    return [described.tensor_name(name, part) for part in group.parts]


def _named(
    groups: Iterable[_Group], tensors: Callable[[str, _Group], Iterable[str]], stored: Collection[str]
) -> dict[str, _Group]:
    """Name -> its description, in the order of names.

    Names are checked one at a time, since a short header could name more than there is memory for.

    Raises:
        ValueError: a name occurs twice, or a tensor that belongs to it is missing.
    """
    group_of: dict[str, _Group] = {}
    for group in groups:
        for name in unfold(group.names, len(stored)):
            if name in group_of:
                raise ValueError(f"its header describes {name} twice")
            for tensor in tensors(name, group):
                if tensor not in stored:
                    raise ValueError(f"the tensor {tensor} is missing")
            group_of[name] = group
    return dict(sorted(group_of.items()))


def _header(
    described: Description, matrices: Mapping[str, _Matrices], others: Mapping[str, _Others], sums: Tensor
) -> Header:
    """The header, with the rows of the tensor of checksums put to the matrices, parts and other tensors in order."""
    rows = (row.numpy().tobytes().hex() for row in sums)
    return Header(
        **{name: getattr(described, name) for name in ModelFields.model_fields},
        matrices={
            name: MatrixEntry(
                kind=group.kind,
                formats=group.formats,
                group_size=group.group_size,
                shape=group.shape,
                digest=next(rows),
                sha256={part: next(rows) for part in group.parts},
            )
            for name, group in matrices.items()
        },
        others={
            name: TensorEntry(dtype=group.dtype, shape=group.shape, sha256=next(rows)) for name, group in others.items()
        },
        signs={columns: next(rows) for columns in in_columns_order(described.rotations)},
    )
