"""What an exporter is: a way to write a packed model in somebody else's format, from its codes and scales.

It works in two steps. `plan` says, for each tensor, in which type of the format it will be stored, how many bytes that
takes, and whether the type holds it exactly; nothing is written. `write` does what the plan says. Between the two the
caller refuses plans that lose something.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from edgerazor.errors import UserError
from edgerazor.packed import PackedModel, TensorClass

#: Tensors named in one message.
NAMED = 3


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedTensor(_Record):
    """One tensor of an export."""

    name: str = Field(description="name of the weight in the packed model")
    target: str = Field(description="name of the tensor in the export")
    kind: TensorClass = Field(description="what the tensor is for")
    type: str = Field(description="type of the export's format that it is stored in")
    weights: int = Field(description="number of weights")
    bytes: int = Field(description="bytes of its data")
    packed_bits: float = Field(0.0, description="bits a weight of codes and scales, where it is quantized")
    reason: str = Field("", description="why it is not exact; empty when every weight is kept bit for bit")

    @property
    def exact(self) -> bool:
        return not self.reason


class ExportPlan(_Record):
    """What an export would write."""

    export: str = Field(description="name of the export")
    tensors: tuple[PlannedTensor, ...] = Field(description="in the order of the file")
    bytes: int = Field(description="bytes of all weight files")
    packed_bytes: int = Field(description="bytes of the packed model's weight files")
    weights: int = Field(description="number of all weights of the packed model")
    causes: tuple[str, ...] = Field((), description="why it is larger than the packed model, and what helps")
    notes: tuple[str, ...] = Field((), description="what the format cannot say about the model")

    @property
    def real_bits(self) -> float:
        """8 * bytes / weights."""
        return 8 * self.bytes / self.weights

    @property
    def packed_real_bits(self) -> float:
        """8 * packed_bytes / weights."""
        return 8 * self.packed_bytes / self.weights

    @property
    def lossy(self) -> list[PlannedTensor]:
        """Tensors of which some weight changes."""
        return [tensor for tensor in self.tensors if not tensor.exact]


class ExportResult(_Record):
    """An export that was written."""

    export: str = Field(description="name of the export")
    file: str = Field(description="the file, or the folder where there are several")
    bytes: int = Field(description="bytes of its weight files")
    real_bits: float = Field(description="8 * bytes / weights")
    packed_real_bits: float = Field(description="the same of the packed model")
    types: dict[str, dict[str, int]] = Field(description="class of tensors -> type -> number of weights")
    notes: list[str] = Field(description="what the format cannot say about the model")
    lossy: list[str] = Field(description="tensors of which some weight changed")

    @classmethod
    def of(cls, plan: ExportPlan, file: Path, size: int) -> ExportResult:
        """The result of a plan, written to `file` with `size` bytes of weight files."""
        types: dict[str, dict[str, int]] = {}
        for tensor in plan.tensors:
            counts = types.setdefault(tensor.kind, {})
            counts[tensor.type] = counts.get(tensor.type, 0) + tensor.weights
        return cls(
            export=plan.export,
            file=str(file),
            bytes=size,
            real_bits=round(8 * size / plan.weights, 4),
            packed_real_bits=round(plan.packed_real_bits, 4),
            types=types,
            notes=list(plan.notes),
            lossy=[tensor.name for tensor in plan.lossy],
        )

    def moved(self, old: Path, new: Path) -> ExportResult:
        """This result after its folder was renamed."""
        return self.model_copy(update={"file": str(new / Path(self.file).relative_to(old))})


class Exporter(ABC):
    """One format to write.

    Attributes:
        name: as in `--export NAME`.
        describe: what it is for, in a few words.
        rotated: whether it can write models whose matrices are rotated, which it rotates back. Other formats store
            codes, and know of no rotation of inputs.
    """

    name: str
    describe: str
    rotated: bool = False

    def variants(self) -> Sequence[Exporter]:
        """All exporters that the file of this one offers, itself included."""
        return (self,)

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Check configuration and tokenizer of a teacher's or a packed model's folder.

        Raises:
            UserError: the format does not know such a model, whatever its weights are.
        """

    @abstractmethod
    def plan(self, model: PackedModel) -> ExportPlan:
        """Say what would be written; reads the codes as far as types depend on them.

        Raises:
            UserError: the format cannot hold the model, or the packed model is damaged.
        """

    @abstractmethod
    def write(self, model: PackedModel, folder: Path, plan: ExportPlan) -> ExportResult:
        """Write what was planned into an empty folder."""


def refuse_rotated(exporter: Exporter, where: str) -> None:
    """Refuse an exporter that cannot write rotated models.

    Args:
        exporter: of any kind.
        where: the folder, or what else is rotated, as the beginning of a sentence.

    Raises:
        UserError: it cannot.
    """
    if not exporter.rotated:
        raise UserError(
            f"{where} has rotated matrices, and programs that read {exporter.name} do not rotate their inputs.",
            "Export it as hf or hf-f32, which rotate the weights back, or pack a model with `--rotation none`.",
        )


def refuse_lossy(plan: ExportPlan) -> None:
    """Refuse a plan that changes weights.

    Raises:
        UserError: it names some of the tensors, and why their type cannot hold them.
    """
    lossy = plan.lossy
    if lossy:
        names = first_few([tensor.name for tensor in lossy])
        raise UserError(
            f"{plan.export} would change weights of {len(lossy)} of {len(plan.tensors)} tensors ({names}): "
            f"{lossy[0].reason}.",
            "Choose an export that holds them, or take the loss with --allow-lossy.",
        )


def first_few(names: Iterable[str]) -> str:
    """The first few of some names."""
    listed = list(names)
    return ", ".join(listed[:NAMED]) + (" ..." if len(listed) > NAMED else "")
