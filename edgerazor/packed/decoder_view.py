"""The decoder inside a packed model that sees, under the names that it has in a model of text.

A model that sees keeps its decoder as `model.text_model` or `model.language_model`, beside its tower. The native engine
and GGUF know a decoder by the names of a model that is nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from edgerazor.families import EMBEDDING
from edgerazor.formats import MatrixSpec
from edgerazor.packed.reading import PackedModel

_Value = TypeVar("_Value")
_INSIDE, _TABLE = EMBEDDING.rsplit(".", 1)


class DecoderView(PackedModel):
    """The decoder of an open packed model; towers are left out.

    Args:
        packed: the whole model.
        path: of the decoder in it.
    """

    def __init__(self, packed: PackedModel, path: str) -> None:
        super().__init__(packed.folder, packed.header, packed._files, packed._file_of)
        self._whole, self._path = packed, f"{path}."
        header = packed.header
        short = {
            name: self._short(name) for name in (*header.matrices, *header.others, *header.tied, *header.tied.values())
        }
        self.header = header.model_copy(
            update={
                "matrices": {short[name]: entry for name, entry in header.matrices.items() if short[name]},
                "others": {short[name]: entry for name, entry in header.others.items() if short[name]},
                "tied": {short[name]: short[other] for name, other in header.tied.items()},
            }
        )

    def _short(self, name: str) -> str:
        """The name in a model of text; empty for what is beside the decoder."""
        if name.startswith(self._path):
            return f"{_INSIDE}.{name.removeprefix(self._path)}"
        return name if not name.startswith(f"{_INSIDE}.") else ""

    def is_beside(self, name: str) -> bool:
        """Whether a tensor of the whole model is no part of the decoder."""
        return not self._short(name)

    def _long(self, name: str) -> str:
        prefix = f"{_INSIDE}."
        return self._path + name.removeprefix(prefix) if name.startswith(prefix) else name

    def _named(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
        return {short: value for name, value in values.items() if (short := self._short(name))}

    def matrix(self, name: str) -> Any:
        return self._whole.matrix(self._long(name))

    def parts(self, name: str) -> dict[str, Tensor]:
        return self._whole.parts(self._long(name))

    def copy_parts(self, name: str, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._whole.copy_parts(self._long(name), buffers)

    def spec(self, name: str) -> MatrixSpec:
        return self._whole.spec(self._long(name))

    def others(self) -> dict[str, Tensor]:
        return self._named(self._whole.others())

    def input_scales(self) -> dict[str, float]:
        return self._named(self._whole.input_scales())


def tower_tensors(packed: PackedModel) -> dict[str, Tensor]:
    """The tensors of a packed model that are beside its decoder; none in a model of text.

    Raises:
        UserError: one of them is damaged.
    """
    view = decoder_of(packed)
    if not isinstance(view, DecoderView):
        return {}
    return {name: tensor for name, tensor in packed.others().items() if view.is_beside(name)}


def decoder_of(packed: PackedModel) -> PackedModel:
    """The decoder of a packed model, which may be the whole of it."""
    table = f".{_TABLE}"
    paths = [name.removesuffix(table) for name in packed.header.matrices if name.endswith(table)]
    return DecoderView(packed, paths[0]) if len(paths) == 1 and paths[0] != _INSIDE else packed
