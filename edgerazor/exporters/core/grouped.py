"""What compressed-tensors and GPTQ have in common: linear layers as integers with a scale for each group of columns.

The programs that read such folders have kernels for a few widths and group sizes, so each matrix gets the fewest bits
that hold its codes and the largest known group that divides its own; both are exact. They also fuse layers that share
an input, q, k and v, and gate and up, into one matrix, which has one width and one group size: layers of a fused set
get the same, and all layers the same group size where that is possible. Embeddings and heads stay floating, in the
smallest dtype that is exact, because few of these programs read them otherwise; so does a layer that does not fit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edgerazor.errors import UserError
from edgerazor.exporters.core import hf_folder, integers
from edgerazor.exporters.core.base import Exporter, ExportPlan, ExportResult, PlannedTensor, first_few
from edgerazor.exporters.core.exact_dtypes import smallest_float
from edgerazor.exporters.core.integers import Integers, UnfitError
from edgerazor.packed import DTYPE_NAMES, DTYPES, PackedModel, TensorSpec, size_table

#: Group sizes for which there are fast kernels (Marlin, ExLlama), the preferred first.
KNOWN_GROUPS = (128, 64, 32)
#: Layers with one input that vLLM and SGLang fuse.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Layout(BaseModel):
    """How a matrix is stored: bits of an integer, and columns that share a scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int
    group_size: int

    def known_group(self, columns: int) -> int | None:
        """The group size to tell other programs; None for one scale a row."""
        return None if self.group_size == columns and columns not in KNOWN_GROUPS else self.group_size


class GroupedPlan(ExportPlan):
    """A plan, the layout of the matrices that are quantized, and the dtypes of those that are not."""

    layouts: dict[str, Layout]
    floats: dict[str, str]


class GroupedExporter(Exporter):
    """An exporter of linear layers as integers in groups.

    Attributes:
        widths: bits that the format has, ascending.
        multiple: of which rows and columns must be.
        settings_file: name of a second file for the quantization settings, if programs look for one.
    """

    widths: Sequence[int]
    multiple: int = 1
    settings_file: str = ""

    @abstractmethod
    def specs(self, name: str, shape: tuple[int, int], layout: Layout) -> dict[str, TensorSpec]:
        """Dtype name and shape of the tensors that a matrix is stored in."""

    @abstractmethod
    def tensors(self, name: str, matrix: Integers, layout: Layout) -> dict[str, Tensor]:
        """The tensors that `specs` announces for a matrix."""

    @abstractmethod
    def settings(self, model: PackedModel, layouts: Mapping[str, Layout]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def known_groups(self, bits: int) -> Sequence[int]:
        """Group sizes for which programs have kernels at a width, the preferred first."""
        return KNOWN_GROUPS

    def check(self, folder: Path) -> None:
        """Nothing is refused before the codes are known."""

    def notes(self, model: PackedModel) -> tuple[str, ...]:
        """What the folder cannot say about how the packed model computes."""
        return hf_folder.notes(model)

    def plan(self, model: PackedModel) -> GroupedPlan:
        """Read every matrix once, to see which widths, groups and dtypes hold it.

        Raises:
            UserError: no linear layer fits.
        """
        layouts, unfit = self._layouts(model)
        if not layouts:
            name, error = next(iter(unfit.items()))
            raise UserError(f"{self.name} can hold none of the linear layers: {name}: {error.reason}.", error.remedy)
        names = [name for name in model.header.matrices if name not in layouts]
        floats = {name: DTYPE_NAMES[smallest_float(hf_folder.decoded(model, name))] for name in names}
        tensors = self._planned(model, layouts, floats)
        sizes = size_table(model)
        return GroupedPlan(
            export=self.name,
            tensors=tensors,
            bytes=sum(tensor.bytes for tensor in tensors),
            packed_bytes=sizes.bytes,
            weights=sizes.parameters,
            causes=tuple(_causes(layouts, floats, unfit)),
            notes=self.notes(model),
            layouts=layouts,
            floats=floats,
        )

    def write(self, model: PackedModel, folder: Path, plan: ExportPlan) -> ExportResult:
        """Write the weights, the settings that say how to read them, and what makes the folder usable."""
        assert isinstance(plan, GroupedPlan)
        pieces = [
            self._piece(model, name, plan.layouts[name])
            if name in plan.layouts
            else hf_folder.decoded_piece(model, name, plan.floats[name])
            for name in model.header.matrices
        ]
        hf_folder.write_weights(folder, [*pieces, hf_folder.others_piece(model)])
        settings = self.settings(model, plan.layouts)
        hf_folder.write_companions(model, folder, dtype="float16", quantization_config=settings)
        if self.settings_file:
            hf_folder.write_json(folder / self.settings_file, settings)
        return ExportResult.of(plan, folder, hf_folder.weight_bytes(folder))

    def _piece(self, model: PackedModel, name: str, layout: Layout) -> hf_folder.Piece:
        def make() -> dict[str, Tensor]:
            matrix = model.matrix(name)
            whole = integers.integers(matrix.encoded, matrix.spec)
            return self.tensors(name, integers.regrouped(whole, layout.group_size), layout)

        return hf_folder.Piece(self.specs(name, model.header.matrices[name].shape, layout), make)

    def _layouts(self, model: PackedModel) -> tuple[dict[str, Layout], dict[str, UnfitError]]:
        """The layout of each linear layer that fits, and why the others do not."""
        fitting: dict[str, Layout] = {}
        unfit: dict[str, UnfitError] = {}
        for name, entry in model.header.matrices.items():
            if entry.kind != "linear":
                continue
            try:
                fitting[name] = self._layout(model, name)
            except UnfitError as error:
                unfit[name] = error
        for names in fused_sets(model.header.matrices):
            _unify_fused(names, fitting, unfit)
        _unify_groups(fitting, {name: entry.shape[1] for name, entry in model.header.matrices.items()})
        return fitting, unfit

    def _layout(self, model: PackedModel, name: str) -> Layout:
        """The layout of one layer, whatever its neighbours have."""
        rows, columns = model.header.matrices[name].shape
        if rows % self.multiple or columns % self.multiple:
            raise UnfitError(
                f"its {rows} rows and {columns} columns are no multiples of {self.multiple}", "choose another export"
            )
        matrix = model.matrix(name)
        integers.integers(matrix.encoded, matrix.spec)
        needed = integers.bits(matrix.spec.weights_by_format((rows, columns)))
        bits = next(width for width in self.widths if width >= needed)
        group = integers.common_group(columns, matrix.spec.group_size, self.known_groups(bits))
        return Layout(bits=bits, group_size=group)

    def _planned(
        self, model: PackedModel, layouts: Mapping[str, Layout], floats: Mapping[str, str]
    ) -> tuple[PlannedTensor, ...]:
        planned = []
        for name, entry in model.header.matrices.items():
            if name in layouts:
                specs = self.specs(name, entry.shape, layouts[name])
                kind = f"int{layouts[name].bits}"
            else:
                specs, kind = {f"{name}.weight": (floats[name], entry.shape)}, floats[name]
            planned.append(
                _planned_tensor(name, next(iter(specs)), entry.kind, kind, math.prod(entry.shape), specs.values())
            )
        for name, spec in hf_folder.others(model).items():
            planned.append(_planned_tensor(name, name, "other", spec[0], math.prod(spec[1]), [spec]))
        return tuple(planned)


def _planned_tensor(
    name: str, target: str, kind: Any, stored: str, weights: int, specs: Iterable[TensorSpec]
) -> PlannedTensor:
    size = sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in specs)
    return PlannedTensor(name=name, target=target, kind=kind, type=stored, weights=weights, bytes=size)


def fused_sets(names: Iterable[str]) -> list[list[str]]:
    """The names of layers that other programs fuse with each other, set by set."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        for number, members in enumerate(FUSED):
            if last in members:
                sets.setdefault((parent, number), []).append(name)
    return [names for names in sets.values() if len(names) > 1]


def _unify_fused(names: Sequence[str], fitting: dict[str, Layout], unfit: dict[str, UnfitError]) -> None:
    """Give the layers of a fused set one layout, or none where one of them does not fit, in place."""
    layouts = [fitting[name] for name in names if name in fitting]
    group = min((layout.group_size for layout in layouts), default=0)
    common = all(layout.group_size % group == 0 for layout in layouts)
    if len(layouts) < len(names) or not common:
        for name in names:
            if fitting.pop(name, None):
                reason = "a layer that is fused with it does not fit"
                unfit[name] = UnfitError(reason, "see the reason of that one")
        return
    shared = Layout(bits=max(layout.bits for layout in layouts), group_size=group)
    fitting.update(dict.fromkeys(names, shared))


def _unify_groups(layouts: dict[str, Layout], columns: Mapping[str, int]) -> None:
    """Give all layers the smallest group size that occurs, where it fills their own, in place.

    Not all programs know group sizes that differ between layers. Whole rows stay whole where all layers have them.
    """
    groups = [group for name, layout in layouts.items() if (group := layout.known_group(columns[name]))]
    smallest = min(groups, default=0)
    for name, layout in layouts.items():
        if smallest and layout.group_size % smallest == 0:
            layouts[name] = Layout(bits=layout.bits, group_size=smallest)


def _causes(layouts: Mapping[str, Layout], floats: Mapping[str, str], unfit: Mapping[str, UnfitError]) -> Iterable[str]:
    """Why the export is larger than the packed model, and what helps."""
    for bits in sorted({layout.bits for layout in layouts.values()}):
        count = sum(layout.bits == bits for layout in layouts.values())
        yield f"{count} linear layers take {bits} bits a weight, the fewest of the format that hold all of their rows."
    wide = [name for name, dtype in floats.items() if name not in unfit]
    if wide:
        dtypes = ", ".join(sorted({floats[name] for name in wide}))
        yield f"{first_few(wide)} stay floating ({dtypes}), since few readers of the format take it quantized."
    for reason in sorted({error.reason for error in unfit.values()}):
        names = [name for name, error in unfit.items() if error.reason == reason]
        yield f"{first_few(names)} stay floating: {reason}; {unfit[names[0]].remedy}."
