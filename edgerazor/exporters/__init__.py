"""Other people's files, written from codes and scales. Each file here whose name has no underscore is an export.

An export is lossless or refused by name: it says which tensors its format cannot hold exactly, and `--allow-lossy` is
the only way around. Read `_base.py` for what an export offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgerazor import registry, workdir
from edgerazor.console import Console, megabytes
from edgerazor.exporters.core.base import Export, ExportPlan, ExportResult, PlannedTensor, refuse_lossy
from edgerazor.packed import PackedModel

__all__ = [
    "Export",
    "ExportPlan",
    "ExportResult",
    "PlannedTensor",
    "available",
    "check",
    "find",
    "plan_all",
    "refuse_lossy",
    "write_all",
]

#: The larger an export is than the packed model, in real bits, before something is said.
NOTICEABLE = 1.10


def available() -> dict[str, Export]:
    """Every export by its name, variants included (`gguf`, `gguf-f16` ...)."""
    found: dict[str, Export] = {}
    for plugin in registry.names("exporters"):
        export: Export = registry.find("exporters", plugin, "EXPORT")
        found |= {variant.name: variant for variant in export.variants()}
    return found


def find(name: str) -> Export:
    """The export of that name.

    Raises:
        UserError: there is none; the message names the closest ones.
    """
    known = available()
    if name not in known:
        raise registry.unknown("export", name, sorted(known))
    return known[name]


def check(names: Sequence[str], folder: Path) -> None:
    """Refuse what cannot be exported whatever its codes are, before anything is made.

    Args:
        names: of exports.
        folder: of the teacher or the packed model: its configuration and tokenizer are looked at.

    Raises:
        UserError: an export is unknown, or does not know the model's family or tokenizer.
    """
    for name in names:
        find(name).check(folder)


def plan_all(folder: Path, names: Sequence[str], allow_lossy: bool, console: Console) -> list[ExportPlan]:
    """What exports of a packed model would be; says where one is noticeably larger.

    Raises:
        UserError: an export is unknown, cannot hold the model, or would change some of its weights.
    """
    check(names, folder)
    model = PackedModel.open(folder)
    plans = [find(name).plan(model) for name in names]
    for plan in plans:
        if not allow_lossy:
            refuse_lossy(plan)
        warn_of_size(plan, console)
    return plans


def write_all(
    folder: Path, names: Sequence[str], target: Path, allow_lossy: bool, console: Console
) -> list[ExportResult]:
    """Write a packed model in other formats, each into a folder of its own.

    Args:
        folder: the packed model.
        names: of exports.
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


def warn_of_size(plan: ExportPlan, console: Console) -> None:
    """Say so when an export is noticeably larger than the packed model, with the causes and remedies."""
    if plan.real_bits > NOTICEABLE * plan.packed_real_bits:
        more = 100 * (plan.real_bits / plan.packed_real_bits - 1)
        console.warn(
            f"{plan.export} takes {plan.real_bits:.2f} real bits ({megabytes(plan.bytes)}), {more:.0f} % more than the "
            f"packed model's {plan.packed_real_bits:.2f}. " + " ".join(plan.causes)
        )
