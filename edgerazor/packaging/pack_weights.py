"""The weights to pack: a student's as training left them, or the teacher's, to be rounded without training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgerazor import formats, modules, student_plan, untrusted
from edgerazor.allocate import MatrixPlan, Plan
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.job import LoadedModel
from edgerazor.models import Structure
from edgerazor.modules.attention import UNIMPORTANT_BITS
from edgerazor.packed import MatrixSource


@dataclass(frozen=True)
class Weights:
    """What is packed.

    Attributes:
        read: path of a module -> its weight (float, or int8 for codes), in the basis that codes are of, and its scales
            where trained or stored.
        others: the tensors that stay as they are, by name.
        digests: path of a module -> digest of the codes and scales that training computed with last; none without
            training.
    """

    read: Callable[[str], tuple[Tensor, Tensor | None]]
    others: dict[str, Tensor]
    digests: dict[str, str]


@contextmanager
def student_weights(folder: Path, structure: Structure) -> Iterator[Weights]:
    """The weights of a student, read from its file one at a time.

    Raises:
        UserError: a file of the student cannot be read.
    """
    try:
        file = safe_open(folder / "model.safetensors", framework="pt").__enter__()
        digests = untrusted.load_json(folder / "digests.json")
        if not all(isinstance(digest, str) for digest in digests.values()):
            raise ValueError("digests.json holds something else than digests")
        names = set(file.keys())
        others = {name: file.get_tensor(name) for name in sorted(names - student_plan.matrix_tensors(structure))}
        of_towers = {name: tensor for name, tensor in others.items() if student_plan.is_of_tower(name, structure)}
        others |= student_plan.in_sixteen_bits(of_towers)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"The student {folder} cannot be read: {str(error).rstrip('.')}.", "Run `edgerazor distill --force`."
        ) from None

    def read(path: str) -> tuple[Tensor, Tensor | None]:
        scales = f"{path}.scales"
        return file.get_tensor(f"{path}.weight"), file.get_tensor(scales) if scales in names else None

    try:
        yield Weights(read, others, digests)
    finally:
        file.__exit__(None, None, None)


@contextmanager
def teacher_weights(
    teacher: LoadedModel, plan: Plan, start: Callable[[str], modules.InitialWeight] | None
) -> Iterator[Weights]:
    """The teacher's own weights, rotated where the plan says so.

    Args:
        teacher: in memory.
        plan: of its matrices.
        start: gives the weight and the scales that calibrate found for a module's path; None to round to nearest.
    """
    state, specs = teacher.model.state_dict(), plan.specs()
    others = student_plan.other_tensors(teacher.model, teacher.structure)

    def read(path: str) -> tuple[Tensor, Tensor | None]:
        weight = state[f"{path}.weight"]
        if start is None:
            return specs[path].rotate(weight), None
        begun = start(path)
        return specs[path].rotate(weight) if begun.weight is None else begun.weight, begun.scales

    yield Weights(read, {name: tensor.contiguous() for name, tensor in others.items()}, {})


def matrix_source(matrix: MatrixPlan, weights: Weights) -> MatrixSource:
    """A matrix of the plan, encoded when it is its turn."""
    spec = matrix.spec()
    return MatrixSource(
        matrix.name, matrix.kind, spec, matrix.shape, lambda: modules.encode_trained(*weights.read(matrix.name), spec)
    )


def tower_sources(towers: student_plan.TowerMatrices, weights: Weights) -> list[MatrixSource]:
    """The matrices of towers, each encoded when it is its turn."""
    return [
        MatrixSource(path, "tower", spec, shape, functools.partial(_encode, weights.others[f"{path}.weight"], spec))
        for path, (spec, shape) in towers.items()
    ]


def _encode(weight: Tensor, spec: MatrixSpec) -> Encoded:
    return formats.encode_matrix(weight.float(), spec)


def whole_zero_points(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors of a student, with trained zero points of inputs as the whole numbers that it computes with."""
    bits = {formats.INPUT_ZERO_POINT: plan.activation_bits, formats.LOW_INPUT_ZERO_POINT: UNIMPORTANT_BITS}
    kinds = {name: name.rpartition(".")[2] for name in tensors}
    return {
        name: formats.whole_zero_point(tensor, bits[kinds[name]]) if kinds[name] in bits else tensor
        for name, tensor in tensors.items()
    }
