"""What a plan says, gathered for people: bits of every matrix by layer and role, shares of formats, sensitivity."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgerazor import calibrated, formats, untrusted
from edgerazor.allocate import MatrixPlan
from edgerazor.errors import UserError, usage_error
from edgerazor.workdir import WorkDir

#: How many of the most sensitive tensors are shown.
MOST = 10


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorSensitivity(_Strict):
    """What one matrix costs in each format."""

    name: str
    kind: Literal["linear", "embedding", "head"]
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    damage: dict[str, float] = Field(
        min_length=1, description="format -> its share of the KL per token that plans are made with, in nats"
    )
    alone: dict[str, float] = Field(
        {}, description="format -> nats of KL per token expected if this matrix alone had that format"
    )


class Sensitivity(_Strict):
    """`calibrate/sensitivity.json`: what was estimated of each matrix."""

    version: Literal[1]
    estimate: str
    tokens: int = Field(ge=0)
    model: str
    tensors: tuple[TensorSensitivity, ...]
    kv: dict[str, float] | None = Field(description="the same of keys and values together")
    measured_kl: dict[str, float] = Field({}, description="estimate -> KL, measured, of the plan that it leads to")


class PlannedMatrix(BaseModel):
    """One matrix of a plan. `layer` and `role` say where a decoder's linear layer is; null for embedding and head."""

    name: str
    kind: Literal["linear", "embedding", "head"]
    layer: int | None
    role: str | None
    rows: int
    columns: int
    bits: float = Field(description="nominal, a weight")
    formats: dict[str, float] = Field(description="format -> share of the weights")


class SensitiveMatrix(BaseModel):
    """A matrix and what it would cost in each format."""

    name: str
    bits: float | None = Field(description="in the plan; null where it is not in it")
    damage: dict[str, float] = Field(description="format -> its share of the KL per token, in nats")


class PlanSummary(BaseModel):
    """A plan. Null is what calibrate has not recorded."""

    notation: str
    strategy: str
    granularity: str
    rotation: str | None = Field(None, description="of matrices and their inputs; null where there is none")
    nominal_bits: float
    real_bits: float | None
    bytes: int | None = Field(description="of the packed weight files")
    predicted_kl: float | None = Field(description="to the teacher before training, nats per token")
    formats: dict[str, float] = Field(description="format -> share of the weights of the decoder's linear layers")
    matrices: list[PlannedMatrix]
    estimate: str | None = Field(description="how sensitivity was estimated")
    tokens: int | None = Field(description="that it was estimated from")
    most_sensitive: list[SensitiveMatrix]
    kv_damage: dict[str, float] | None

    def linears(self) -> list[PlannedMatrix]:
        return [matrix for matrix in self.matrices if matrix.kind == "linear"]

    def ends(self) -> list[PlannedMatrix]:
        """Embedding and head."""
        return [matrix for matrix in self.matrices if matrix.kind != "linear"]

    def roles(self) -> list[str]:
        """The columns of the map, in the model's order."""
        return list(dict.fromkeys(matrix.role for matrix in self.linears() if matrix.role is not None))

    def layers(self) -> list[int]:
        """The rows of the map."""
        return sorted({matrix.layer for matrix in self.linears() if matrix.layer is not None})

    def grid(self) -> dict[tuple[int | None, str | None], float]:
        """(layer, role) -> bits, where a layer has that role."""
        return {(matrix.layer, matrix.role): matrix.bits for matrix in self.linears()}

    def range(self) -> tuple[float, float]:
        """Bits of the narrowest and the widest format that some weight has."""
        widths = [formats.get(name).nominal_bits for matrix in self.matrices for name in matrix.formats]
        return min(widths), max(widths)


def summarize(work: WorkDir) -> PlanSummary:
    """Gather the plan of a working directory.

    Raises:
        UserError: there is no plan, or a file of calibrate is damaged.
    """
    if not work.recipe_file.exists():
        raise usage_error(
            f"{work.path} is not a working directory of edgerazor yet.", "Begin with `edgerazor calibrate MODEL`."
        )
    if not work.plan_file.exists():
        raise UserError(f"{work.path} holds no plan yet.", "Run `edgerazor calibrate`, or name its folder: --work DIR.")
    plan, sensitivity = calibrated.read_plan(work), read_sensitivity(work)
    where = places([matrix.name for matrix in plan.matrices if matrix.kind == "linear"])
    matrices = [_planned(matrix, *where.get(matrix.name, (None, None))) for matrix in plan.matrices]
    manifest = work.manifest("calibrate")
    result = manifest.result if manifest else {}
    return PlanSummary(
        notation=plan.notation(),
        strategy=plan.strategy,
        granularity=plan.granularity,
        rotation=plan.rotation,
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=result.get("real_bits"),
        bytes=result.get("bytes"),
        predicted_kl=plan.predicted_kl,
        formats=shares([matrix for matrix in plan.matrices if matrix.kind == "linear"]),
        matrices=matrices,
        estimate=sensitivity.estimate if sensitivity else None,
        tokens=sensitivity.tokens if sensitivity else None,
        most_sensitive=_most_sensitive(sensitivity, matrices) if sensitivity else [],
        kv_damage=sensitivity.kv if sensitivity else None,
    )


def read_sensitivity(work: WorkDir) -> Sensitivity | None:
    """What calibrate estimated; None where it did not.

    Raises:
        UserError: the file is damaged.
    """
    path = work.sensitivity_file
    try:
        return untrusted.load_model(path, Sensitivity)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the top"
        reason = f"it is wrong at {place} ({first['msg']})"
    except (OSError, ValueError):
        reason = "it cannot be read as text"
    raise UserError(f"{path} is damaged: {reason}.", "Make it again with `edgerazor calibrate --force`.")


def places(names: list[str]) -> dict[str, tuple[int, str]]:
    """Path of a linear layer -> its decoder layer and its role there.

    The layer is the first number in the path that follows the same words in all of them. The role is the last word, or
    the whole rest of the path where two modules of a layer end in the same word.
    """
    paths = {name: name.split(".") for name in names}
    at = 0
    while not all(len(path) > at + 1 and path[at].isdecimal() for path in paths.values()):
        if len({path[at] for path in paths.values() if len(path) > at}) != 1:
            return {name: (0, name) for name in names}
        at += 1
    rests = {".".join(path[at + 1 :]) for path in paths.values()}
    ends = Counter(rest.rpartition(".")[2] for rest in rests)

    def role(rest: str) -> str:
        end = rest.rpartition(".")[2]
        return end if ends[end] == 1 else rest

    return {name: (int(path[at]), role(".".join(path[at + 1 :]))) for name, path in paths.items()}


def shares(matrices: list[MatrixPlan]) -> dict[str, float]:
    """Format -> share of the weights of some matrices, the narrowest first."""
    counts: Counter[str] = Counter()
    for matrix in matrices:
        counts.update(matrix.spec().weights_by_format(matrix.shape))
    total = counts.total()
    order = sorted(counts, key=lambda name: (formats.get(name).nominal_bits, name))
    return {name: round(counts[name] / total, 6) for name in order}


def _planned(matrix: MatrixPlan, layer: int | None, role: str | None) -> PlannedMatrix:
    return PlannedMatrix(
        name=matrix.name,
        kind=matrix.kind,
        layer=layer,
        role=role,
        rows=matrix.rows,
        columns=matrix.columns,
        bits=round(matrix.spec().nominal_bits(matrix.shape), 4),
        formats=shares([matrix]),
    )


def _most_sensitive(sensitivity: Sensitivity, matrices: list[PlannedMatrix]) -> list[SensitiveMatrix]:
    """Those that the worst of their formats costs most, in that order."""
    bits = {matrix.name: matrix.bits for matrix in matrices}
    worst = sorted(sensitivity.tensors, key=lambda tensor: -max(tensor.damage.values()))[:MOST]
    return [SensitiveMatrix(name=t.name, bits=bits.get(t.name), damage=t.damage) for t in worst]
