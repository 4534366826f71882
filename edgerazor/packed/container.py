"""Safetensors files: where each tensor goes, and opening them without trust."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from edgerazor import untrusted
from edgerazor.errors import UserError, plain

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SHARD_BYTES = 4 * 10**9
ALIGNMENT = 64
#: Most bytes of JSON that are read of a file: many times what a large model needs.
MOST_JSON = 1 << 24

#: Names of dtypes in a safetensors file.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Name of the dtype in a safetensors file, and shape.
TensorSpec: TypeAlias = tuple[str, tuple[int, ...]]


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Dtype and shape of a tensor that is to be stored under a name.

    Raises:
        ValueError: the dtype cannot be stored.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} has the dtype {tensor.dtype}, which cannot be stored")
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's data."""
    dtype, shape = spec
    return DTYPES[dtype].itemsize * math.prod(shape)


def sha256(pieces: Iterable[memoryview]) -> str:
    """SHA-256 (hexadecimal) of bytes that follow one another."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


# Writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A weight file or the index, without the data of its tensors.

    Attributes:
        name: of the file.
        header_bytes: what stands before the data; the whole content of the index.
        offsets: where the data of each tensor begin, counted from the end of that.
        data: bytes of all data.
    """

    name: str
    header_bytes: bytes
    offsets: Mapping[str, int]
    data: int = 0

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header_bytes) + self.data


def arrange(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], shards: Mapping[str, Sequence[str]]
) -> list[File]:
    """The weight files without their data, and their index if they are several.

    Args:
        specs: of all tensors, by name.
        metadata: of the first file.
        shards: file name -> names of its tensors, as `cut` gives them.
    """
    files = [
        _safetensors(file, {name: specs[name] for name in names}, {} if number else metadata)
        for number, (file, names) in enumerate(shards.items())
    ]
    if len(files) == 1:
        return files
    return [*files, File(INDEX_FILE, index_bytes(shards, sum(map(spec_bytes, specs.values()))), {})]


def index_bytes(shards: Mapping[str, Sequence[str]], total: int) -> bytes:
    """The content of the index of several weight files: the file of each tensor, and the bytes of all tensors."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=1, allow_nan=False) + "\n").encode()


def cut(specs: Mapping[str, TensorSpec], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> the names of its tensors: all in order, with a new file where one would exceed `shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs):
        if shards[-1] and size + spec_bytes(specs[name]) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec_bytes(specs[name])
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)
    }


def _safetensors(file: str, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> File:
    """One safetensors file without its data.

    Tensors that fill whole vectors come first, then those that fill half of one, and so on: each begins where it is
    fast to read. (The library's own writer orders metadata by chance, so that equal runs would differ.)
    """
    names = sorted(specs, key=lambda name: (-_alignment(specs[name]), name))
    offsets, end = {}, 0
    for name in names:
        offsets[name], end = end, end + spec_bytes(specs[name])
    return File(file, safetensors_header({name: specs[name] for name in names}, offsets, metadata), offsets, end)


def safetensors_header(
    specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str], size: int = 0
) -> bytes:
    """What stands before the data of a safetensors file: its length, 8 bytes, and JSON that ends in spaces.

    Args:
        specs: of the tensors, in the order of their data.
        offsets: where the data of each begin.
        metadata: the file's metadata beside the usual `format`.
        size: bytes of the result, a multiple of 64 that is large enough; 0 for the smallest one.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for name, spec in specs.items():
        data_offsets = [offsets[name], offsets[name] + spec_bytes(spec)]
        entries[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": data_offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (size - 8 - len(text) if size else -(8 + len(text)) % ALIGNMENT)
    assert not size or 8 + len(text) == size
    return struct.pack("<Q", len(text)) + text


def _alignment(spec: TensorSpec) -> int:
    """The largest power of two, at most 64, that divides the bytes of a tensor."""
    return math.gcd(spec_bytes(spec), ALIGNMENT)


# Reading ----------------------------------------------------------------------------------------------------------


def damaged_model(path: Path, reason: str) -> UserError:
    """The error, of one sentence, for a file that cannot be trusted; names in the file cannot add sentences to it."""
    reason = plain(reason.rstrip("."))
    return UserError(f"{path} is damaged or no packed model: {reason}.", "Make it again with `edgerazor pack`.")


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Open all weight files of a folder.

    Returns:
        File name -> open safetensors file, the first one first; tensor name -> file name.

    Raises:
        UserError: a file is missing, cut off or no safetensors file, or the index contradicts them.
    """
    index = _read_index(folder)
    names = [WEIGHTS_FILE] if index is None else sorted(set(index.values()))
    files = {name: _open_file(folder / name) for name in names}
    file_of: dict[str, str] = {}
    for file, opened in files.items():
        for tensor in opened.keys():  # noqa: SIM118 (a safetensors file cannot be iterated over)
            if tensor in file_of:
                raise damaged_model(folder / file, f"it holds {tensor}, which {file_of[tensor]} holds too")
            file_of[tensor] = file
    if index is not None and index != file_of:
        name = min(name for name in index.keys() | file_of.keys() if index.get(name) != file_of.get(name))
        raise damaged_model(folder / INDEX_FILE, f"it and the weight files disagree about where {name} is")
    return files, file_of


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of a sharded folder; None where there is one weight file."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return None
    if not path.is_file():
        raise UserError(f"There is no packed model in {folder}: {WEIGHTS_FILE} is missing.", "Run `edgerazor pack`.")
    try:
        weight_map = untrusted.load_json(path, unambiguous=True, most_bytes=MOST_JSON)["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise damaged_model(path, "it is not an index of safetensors files") from None
    for file in entries.values():
        if not SHARD_NAME.fullmatch(file):
            raise damaged_model(path, f"{file!r} is not the name of a weight file")
    if not entries:
        raise damaged_model(path, "it names no files")
    return entries


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise damaged_model(path, "the file is missing")
    try:
        _check_header(path)
        return safe_open(path, framework="pt")
    except Exception as error:  # the library raises its own, the system's and decoding errors
        reason = " ".join(str(error).split())
        raise damaged_model(path, f"it is cut off or not a safetensors file ({reason})") from None


def _check_header(path: Path) -> None:
    """Refuse what the library does not: names that occur twice, and a header so large that it would fill the memory."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_JSON:
            raise ValueError(f"its header would have {length} bytes")
        untrusted.parse_json(file.read(length), unambiguous=True)
