"""Finding exporters by name, and writing a packed model with all that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgerazor import registry, workdir
from edgerazor.console import Console, megabytes
from edgerazor.exporters.core.base import Exporter, ExportPlan, ExportResult, refuse_lossy, refuse_rotated
from edgerazor.packed import PackedModel

#: How much larger than the packed model an export may be, in real bits, before there is a warning.
NOTICEABLE = 1.10


def available() -> dict[str, Exporter]:
    """Every exporter by its name, variants included (`gguf`, `gguf-f16` ...)."""
    exporters: dict[str, Exporter] = {}
    for plugin in registry.names("exporters"):
        exporter: Exporter = registry.find("exporters", plugin, "EXPORTER")
        exporters |= {variant.name: variant for variant in exporter.variants()}
    return exporters


def find(name: str) -> Exporter:
    """The exporter of that name.

    Raises:
        UserError: there is none; the message names the closest ones.
    """
    known = available()
    if name not in known:
        raise registry.unknown("export", name, sorted(known))
    return known[name]


def check(names: Sequence[str], folder: Path) -> None:
    """Refuse what cannot be exported whatever its codes are, before anything is computed or written.

    Args:
        names: of exporters.
        folder: of the teacher or of the packed model, with configuration and tokenizer.

    Raises:
        UserError: an exporter is unknown, or does not know the model's family or tokenizer.
    """
    for name in names:
        find(name).check(folder)


def plan_all(folder: Path, names: Sequence[str], allow_lossy: bool, console: Console) -> list[ExportPlan]:
    """Plan the exports of a packed model; warns where one is noticeably larger than the model.

    Raises:
        UserError: an exporter is unknown, cannot hold the model or its rotation, or would change some of its weights.
    """
    check(names, folder)
    model = PackedModel.open(folder)
    if model.header.rotations:
        for name in names:
            refuse_rotated(find(name), str(folder))
    plans = [find(name).plan(model) for name in names]
    for plan in plans:
        if not allow_lossy:
            refuse_lossy(plan)
        _warn_of_size(plan, console)
    return plans


def write_all(
    folder: Path, names: Sequence[str], target: Path, allow_lossy: bool, console: Console
) -> list[ExportResult]:
    """Write a packed model in other formats, every one into a folder of its own.

    Args:
        folder: the packed model.
        names: of exporters.
        target: `target/<name>` is replaced as a whole once an export is complete.
        allow_lossy: write tensors that the format cannot hold exactly, too.
        console: where to say what an export will be before it is written.

    Raises:
        UserError: as `plan_all`; then nothing is written.
    """
    plans = plan_all(folder, names, allow_lossy, console)
    model = PackedModel.open(folder)
    results = []
    for plan in plans:
        console.say(f"{plan.export}: writing {megabytes(plan.bytes)}")
        with workdir.replace_folder(target / plan.export) as temporary:
            result = find(plan.export).write(model, temporary, plan)
        results.append(result.moved(temporary, target / plan.export))
    return results


def _warn_of_size(plan: ExportPlan, console: Console) -> None:
    """Warn where an export is noticeably larger than the packed model, with the causes and remedies."""
    if plan.real_bits > NOTICEABLE * plan.packed_real_bits:
        more = 100 * (plan.real_bits / plan.packed_real_bits - 1)
        console.warn(
            f"{plan.export} takes {plan.real_bits:.2f} real bits ({megabytes(plan.bytes)}), {more:.0f} % more than the "
            f"packed model's {plan.packed_real_bits:.2f}. " + " ".join(plan.causes)
        )
