"""A model folder in the layout of Hugging Face, written tensor by tensor: what most programs read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from edgerazor import formats, models, untrusted
from edgerazor.formats import OF_INPUTS
from edgerazor.packed import DTYPES, INDEX_FILE, WEIGHTS_FILE, PackedModel, TensorSpec
from edgerazor.workdir import write_atomically, write_json

#: Largest file of weights, and about the memory that writing takes; a single larger piece gets a file of its own.
SHARD_BYTES = 2 * 10**9


class Piece(NamedTuple):
    """Tensors that are computed together, as those of one matrix.

    Attributes:
        specs: dtype name and shape of each, by name.
        make: computes them.
    """

    specs: Mapping[str, TensorSpec]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in self.specs.values())


def write_weights(folder: Path, pieces: Iterable[Piece], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as transformers does: one file, or numbered files and their index.

    Raises:
        ValueError: two tensors have the same name, or a piece makes others than its specs announce.
    """
    shards = _shards(pieces, shard_bytes)
    names = [name for shard in shards for piece in shard for name in piece.specs]
    if len(names) != len(set(names)):
        raise ValueError(f"two tensors are called {next(name for name in names if names.count(name) > 1)}")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor for piece in shard for name, tensor in _make_checked(piece).items()}
        _save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(piece.bytes for shard in shards for piece in shard)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _shards(pieces: Iterable[Piece], shard_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    return shards


def _make_checked(piece: Piece) -> dict[str, Tensor]:
    """The tensors of a piece, contiguous; they must be those that its specs announce."""
    tensors = {name: tensor.contiguous() for name, tensor in piece.make().items()}
    actual = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if actual != {name: (DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in piece.specs.items()}:
        raise ValueError(f"{', '.join(piece.specs)} should be {dict(piece.specs)}, and are {actual}")
    return tensors


def write_companions(model: PackedModel, folder: Path, **changes: Any) -> None:
    """Write config.json, with changes in the place of our `quantization_config`, tokenizer and chat template.

    It says that the head is tied exactly where no matrix of its own is written.
    """
    values = untrusted.read_configuration(model.folder)
    values.pop("quantization_config", None)
    for section in (values, values.get("text_config")):
        if isinstance(section, dict):
            section["tie_word_embeddings"] = bool(model.header.tied)
    write_json(folder / "config.json", dict(sorted((values | changes).items())))
    models.copy_companions(model.folder, folder)


def others(model: PackedModel) -> dict[str, TensorSpec]:
    """The tensors that are not quantized, without stored input scales, which other programs do not know."""
    return {
        name: (entry.dtype, entry.shape)
        for name, entry in model.header.others.items()
        if name.rpartition(".")[2] not in OF_INPUTS
    }


def others_piece(model: PackedModel, dtype: Callable[[str], str] = lambda stored: stored) -> Piece:
    """The unquantized tensors of a packed model, in the dtype (by name) that is given for the stored one."""
    specs = {name: (dtype(stored), shape) for name, (stored, shape) in others(model).items()}

    def make() -> dict[str, Tensor]:
        tensors = model.others()
        return {name: tensors[name].to(DTYPES[dtype_name]) for name, (dtype_name, _) in specs.items()}

    return Piece(specs, make)


def decoded_piece(model: PackedModel, name: str, dtype: str) -> Piece:
    """A matrix, dequantized, as `name.weight`."""
    target = f"{name}.weight"
    return Piece({target: (dtype, model.header.matrices[name].shape)}, lambda: {target: decoded(model, name, dtype)})


def decoded(model: PackedModel, name: str, dtype: str = "F32") -> Tensor:
    """The model's own weights [rows, cols] of a matrix, rotated back where codes are of rotated ones."""
    matrix = model.matrix(name)
    return matrix.spec.rotate_back(formats.decode_matrix(matrix.encoded, matrix.spec)).to(DTYPES[dtype])


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files, and of their index."""
    return sum(file.stat().st_size for file in folder.glob("model*"))


def notes(model: PackedModel, *, of_inputs: bool = True) -> tuple[str, ...]:
    """What such a folder cannot say about how the packed model computes; `of_inputs`: nor of inputs' bits."""
    settings = model.header.settings
    names = {"inputs of linear layers": "activation_bits"} if of_inputs else {}
    names["keys and values"] = "kv_bits"
    rounded = [f"{what} to {settings[name]} bits" for what, name in names.items() if settings.get(name, 16) != 16]
    lines = []
    if model.header.rotations:
        lines.append("The packed model's weights are rotated; here they are rotated back, in float32.")
    if rounded:
        lines.append(f"The packed model rounds {' and '.join(rounded)}; programs that read this folder do not.")
    return tuple(lines)
