"""Weights of linear layers that a layer-by-layer pass computes with in place of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.models import Structure


class LayerCache:
    """Tensors of the linear layers of the current decoder layer; they are dropped when another one begins."""

    def __init__(self, structure: Structure) -> None:
        self._layers = {target.name: target.layer for target in structure.linears}
        self._layer: int | None = None
        self._tensors: dict[str, Tensor] = {}

    def get(self, path: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of a linear layer, computed if it is not cached."""
        if self._layers[path] != self._layer:
            self._layer, self._tensors = self._layers[path], {}
        if path not in self._tensors:
            self._tensors[path] = compute()
        return self._tensors[path]


class RoundedWeights:
    """A weight transform: `w + share * (ŵ - w)`, the rounded weights or points between them and the teacher's.

    Args:
        structure: where the matrices are.
        specs: module path -> formats; other weights stay as they are.
        share: 1 for the rounded weights.
    """

    def __init__(self, structure: Structure, specs: Mapping[str, MatrixSpec], share: float = 1.0) -> None:
        self.specs, self.share = specs, share
        self._errors = LayerCache(structure)

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The transformed weight [rows, columns], in the dtype of the given one."""
        return weight + self.share * self.error(path, weight) if path in self.specs else weight

    def error(self, path: str, weight: Tensor | None = None) -> Tensor:
        """`ŵ - w` [rows, columns]; `w` must be given at the first call while its decoder layer is onloaded."""

        def compute() -> Tensor:
            assert weight is not None
            return formats.rounded_weight(weight, self.specs[path]).sub_(weight).to(weight.dtype)

        return self._errors.get(path, compute)
