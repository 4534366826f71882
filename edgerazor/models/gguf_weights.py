"""The weights of a GGUF file, dequantized, with the names, shapes and order of rows of transformers.

They are read tensor by tensor, and those of many rows in pieces, so memory does not grow with the model. Rows of
queries and keys go back to the order of transformers and gains of norms lose what llama.cpp adds to them, both before
anything is rounded.

Weights become bfloat16, which rounds a dequantized weight by less than a tenth of what quantizing did. Files of
floating numbers keep theirs: F32 stays float32 and F16 float16, but for Gemma, whose states leave the range of float16.

Source: `conversion/*.py` of llama.cpp, which did the opposite; the package `gguf` knows names and types.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from edgerazor.errors import UserError
from edgerazor.models.experts import separate_experts
from edgerazor.models.gguf_configuration import POSITIONS, find_family, gguf_configuration
from edgerazor.models.gguf_values import column_order, from_gguf, row_order
from edgerazor.untrusted.gguf_file import TYPES, GgufFile

#: Weights that are dequantized at once.
PIECE = 1 << 22
#: Names of numbers in safetensors files.
SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
#: Path of a matrix of an expert: list of experts, number, name of the matrix.
OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


class GgufWeights:
    """The weights of a file with the names, shapes and order of rows of transformers.

    Attributes:
        file: where they are.
        model_type: of transformers.
        family: what GGUF files of it take for granted.
        config: configuration of transformers, as JSON values.
        sources: name in transformers -> name in the file.
        dtype: that they get.
        types: type of ggml -> weights that have it, most first.
        type: of the file, as llama.cpp calls it.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        _, self.family = find_family(file)
        self.config = gguf_configuration(file)
        self.model_type = self.config["model_type"]
        self.sources, self.shapes = self._named_tensors()
        self.types = self._types()
        self.type = _file_type(file) or next(iter(self.types))
        self.dtype = self._dtype()

    def config_json(self) -> dict[str, Any]:
        """The content of config.json."""
        dtype = str(self.dtype).removeprefix("torch.")
        architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]]
        return {**self.config, "architectures": architectures, "dtype": dtype}

    def _named_tensors(self) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
        """Names in the file and shapes of all weights of the model.

        Raises:
            UserError: one is missing, has another shape, or is no part of such a model.
        """
        from edgerazor.models.loading import completed, skeleton

        model = separate_experts(skeleton(completed(self.config)))

        file, architecture = self.file, str(self.file.metadata["general.architecture"])
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbers[architecture], self.config["num_hidden_layers"])
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.config["tie_word_embeddings"]:
            shapes.pop("lm_head.weight", None)
        sources: dict[str, str] = {}
        for name, shape in shapes.items():
            module, _, parameter = name.rpartition(".")
            expert = OF_EXPERT.fullmatch(module)
            whole = f"{expert[1]}.{expert[3]}" if expert else module  # the experts of a layer are one tensor
            source = self._parameter(name) or f"{names.get_name(whole)}.{parameter}"
            if source not in file.tensors:
                raise file.damaged(f"it lacks {source} ({name} of a {self.model_type} model)")
            expected = (self.config["num_experts"], *shape) if expert else _stored_shape(shape)
            if file.tensors[source].shape != expected:
                raise file.damaged(
                    f"{source} is {list(file.tensors[source].shape)}, and its metadata say {list(expected)}"
                )
            sources[name] = source
        unknown = sorted(file.tensors.keys() - sources.values() - POSITIONS)
        if unknown:
            raise UserError(
                f"{file.path} has the tensor {unknown[0]}, which no {architecture} model has here.",
                "Give the original model's folder or hub id.",
            )
        return sources, shapes

    def _types(self) -> dict[str, int]:
        """Types and their numbers of weights; each tensor is looked for in the file.

        Raises:
            UserError: a tensor does not lie in the file, or cannot be dequantized.
        """
        counts: Counter[str] = Counter()
        kernels = {source for name, source in self.sources.items() if len(self.shapes[name]) == 3}  # always F32
        for source in dict.fromkeys(self.sources.values()):
            tensor = self.file.tensors[source]
            first = self.file.blocks(source)[: tensor.shape[-1] // TYPES[tensor.type][1]]
            self._dequantize(source, first.reshape(1, -1))
            if len(tensor.shape) > 1 and source not in kernels:
                counts[self.file.type_name(source)] += math.prod(tensor.shape)
        return dict(counts.most_common())

    def _dtype(self) -> torch.dtype:
        if "F32" in self.types:
            return torch.float32
        if self.types.keys() == {"F16"} and self.family.float16:
            return torch.float16
        return torch.bfloat16

    def bytes(self) -> int:
        """Bytes of all weights as they are written."""
        return sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize

    def write(self, path: Path, done: Callable[[], None]) -> None:
        """Write all weights into a safetensors file, one after the other.

        Args:
            path: of the file.
            done: called after each.
        """
        size = self.dtype.itemsize
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.shapes.items():
            begin, end = end, end + size * math.prod(shape)
            header[name] = {"dtype": SAFETENSORS[self.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            for name in self.shapes:
                for piece in self.pieces(name):
                    piece.to(self.dtype).contiguous().view(torch.uint8).numpy().tofile(output)
                done()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A weight, dequantized, float32, in pieces of whole rows [rows, cols] (or [cols], if it has no rows)."""
        source = self.sources[name]
        tensor = self.file.tensors[source]
        order, columns_order = (
            None if order is None else torch.argsort(order)
            for order in (find(self.family, self.config, source) for find in (row_order, column_order))
        )
        if len(tensor.shape) == 1:
            values = self._dequantize(source, self.file.blocks(source).reshape(1, -1)).flatten()
            yield from_gguf(self.family, name, values if order is None else values[order])
            return
        columns = tensor.shape[-1]
        rows = self.file.blocks(source).reshape(math.prod(tensor.shape[:-1]), -1)
        if expert := OF_EXPERT.match(name):
            first = int(expert[2]) * self.shapes[name][0]
            rows = rows[first : first + self.shapes[name][0]]
        step = max(1, PIECE // columns)
        for begin in range(0, len(rows), step):
            chosen = slice(begin, begin + step) if order is None else order[begin : begin + step].numpy()
            values = self._dequantize(source, rows[chosen])
            yield values if columns_order is None else values[:, columns_order]

    def _parameter(self, name: str) -> str:
        """The name in the file of a parameter that is neither weight nor bias; of others an empty string."""
        parts = name.split(".")
        part = self.family.parameters.get(".".join(parts[3:]))
        return f"blk.{parts[2]}.{part}" if part else ""

    def _dequantize(self, source: str, rows: NDArray[np.uint8]) -> Tensor:
        """Bytes of rows, uint8 [rows, bytes], as float32 [rows, cols]."""
        kind = self.file.type_name(source)
        try:
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
        except (KeyError, NotImplementedError, ValueError):
            raise UserError(
                f"{self.file.path}: {source} has the type {kind}, which the package gguf does not dequantize.",
                "Give a file of another type, or the original model.",
            ) from None
        return torch.from_numpy(values if values.flags.writeable else values.copy()).float()


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in the file: kernels of convolutions over single features are matrices."""
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def _file_type(file: GgufFile) -> str:
    """llama.cpp's name of the mixture of types (`Q4_K_M`), or an empty string."""
    number = file.metadata.get("general.file_type")
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    return names.get(number, "") if isinstance(number, int) and number != int(gguf.LlamaFileType.GUESSED) else ""
