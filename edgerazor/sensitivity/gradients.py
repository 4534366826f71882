"""What the backward pass through the layers gathers for the estimates of sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.models import Observer, Structure
from edgerazor.sensitivity.rounding import LayerCache, RoundedWeights

#: Prefix of the names of per-matrix sensitivities in files.
PER_MATRIX = "alone/"


class FisherSensitivity(Observer):
    """`E[(g d)²] / 2`, of rows and of whole matrices.

    Args:
        structure: where the matrices are.
        specs: a matrix all in one format, for each of the formats.
        rotation: of its columns, as the recipe calls it.

    Attributes:
        rows: path -> float64 [formats, rows], summed over tokens.
        matrices: path -> float64 [formats], summed over tokens: `(Σ g d)² / 2` with the sum over the rows.
    """

    def __init__(self, structure: Structure, specs: Sequence[MatrixSpec], rotation: str | None = None) -> None:
        self.specs, self.rotation = tuple(specs), rotation
        self.rows: dict[str, Tensor] = {}
        self.matrices: dict[str, Tensor] = {}
        self._errors = LayerCache(structure)

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        def compute() -> Tensor:
            rotation = formats.find_rotation(self.rotation, weight.shape[1])
            specs = [replace(spec, rotation=rotation) for spec in self.specs]
            rounded = [formats.rounded_weight(weight, spec, weight.dtype) for spec in specs]
            return torch.stack(rounded).sub_(weight)

        rows, matrices = [], []
        for error in self._errors.get(path, compute):
            change = (x @ error.T).mul_(g).float()
            matrices.append(change.sum(1).square_().sum())
            rows.append(change.square_().sum(0))
        self.rows[path] = self.rows.get(path, 0) + torch.stack(rows).double().cpu() / 2
        self.matrices[path] = self.matrices.get(path, 0) + torch.stack(matrices).double().cpu() / 2

    def state(self) -> dict[str, Tensor]:
        return self.rows | {PER_MATRIX + path: value for path, value in self.matrices.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.rows, self.matrices = split_rows_and_matrices(state)

    def identity(self) -> str:
        rotation = (self.rotation,) if self.rotation else ()
        return str([(spec.formats, spec.group_size, spec.published, *rotation) for spec in self.specs])


def split_rows_and_matrices(sensitivities: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split sensitivities by name: those of rows, and those of whole matrices, both by module path."""
    rows = {name: value for name, value in sensitivities.items() if not name.startswith(PER_MATRIX)}
    return rows, {name.removeprefix(PER_MATRIX): value for name, value in sensitivities.items() if name not in rows}


class IntegratedGradients(Observer):
    """`Σ g · (ŵ - w)` per row, of weights that a `RoundedWeights` transforms.

    Attributes:
        rows: path -> float64 [rows], summed over tokens.
    """

    def __init__(self, rounded: RoundedWeights) -> None:
        self.rounded = rounded
        self.rows: dict[str, Tensor] = {}

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        products = (g.T @ x).float().mul_(self.rounded.error(path)).sum(1, dtype=torch.float64)
        self.rows[path] = self.rows.get(path, 0) + products.cpu()

    def state(self) -> dict[str, Tensor]:
        return dict(self.rows)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.rows = dict(state)
