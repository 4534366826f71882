"""How long packing takes, estimated from some rows of each kind of matrix, written and verified."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import formats, packed
from edgerazor.allocate import MatrixPlan, Plan
from edgerazor.models import PreTrainedModel
from edgerazor.packed import MatrixSource

#: Weights of each kind that a dry run packs.
SAMPLE = 1 << 22


def estimated_seconds(plan: Plan, teacher: PreTrainedModel) -> float:
    """How long all cores take to write and verify the matrices of a plan, from some rows of each kind."""
    total, longest = 0.0, 0.0
    for kind in sorted({matrix.kind for matrix in plan.matrices}):
        alike = [matrix for matrix in plan.matrices if matrix.kind == kind]
        weights = {matrix.name: matrix.rows * matrix.columns for matrix in alike}
        largest = max(alike, key=lambda matrix: weights[matrix.name])
        once = seconds_per_weight(largest, teacher.get_submodule(largest.name).weight)
        total += once * sum(weights.values())
        longest = max(longest, once * weights[largest.name])
    return max(longest, total / min(packed.cores(), len(plan.matrices)))  # a matrix is one core's


def seconds_per_weight(matrix: MatrixPlan, weight: Tensor) -> float:
    """Of one core that packs and verifies the first rows of a matrix."""
    rows = min(matrix.rows, max(1, SAMPLE // matrix.columns))
    spec = matrix.spec().take(torch.arange(rows))
    sample = MatrixSource(
        "rows", "linear", spec, (rows, matrix.columns), lambda: formats.encode_matrix(spec.rotate(weight[:rows]), spec)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            packed.write(Path(folder), [sample], {}, tied={}, settings={}, provenance={})
            packed.PackedModel.open(Path(folder)).verify()
            return (time.monotonic() - began) / (rows * matrix.columns)
    finally:
        torch.set_num_threads(threads)
