"""A packed model made of somebody else's quantized one: `edgerazor pack FILE.gguf`."""

from __future__ import annotations

import shlex
from pathlib import Path

from edgerazor import exporters, importers, packed
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.packaging.model_card import Making, write_card
from edgerazor.packaging.pack_result import ForeignResult
from edgerazor.packaging.teacher_card import read_teacher_card
from edgerazor.recipe import Calibrate, Recipe
from edgerazor.workdir import WorkDir, alone, recover_folder


def read_foreign(path: Path, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> ForeignResult:
    """A packed folder of somebody else's quantized model, and its exports.

    Args:
        path: what they wrote.
        recipe: how the packed model computes, and what is exported.
        work: its packed folder is written, but it does not become a job: there is no teacher.
        console: where to say what is done.
        force: replace a packed folder that is not an import.

    Raises:
        UserError: it is refused, or there is something else in the way.
    """
    target, settings = work.folder("pack"), recipe.pack
    with work.lock():
        recover_folder(target)
        if work.recipe_file.exists() or (target.exists() and not (force or _is_import(target))):
            raise usage_error(
                f"{work.path} holds another job or packed model, which this one would replace.",
                f"Give it a folder of its own: `edgerazor pack {path} --work NAME`.",
            )
        imported = importers.import_model(
            path,
            target,
            console,
            activation_bits=_given_bits(recipe.calibrate, "activation_bits"),
            kv_bits=_given_bits(recipe.calibrate, "kv_bits"),
            lossy=settings.allow_lossy,
        )
        with alone(target):
            write_card(target, read_teacher_card(str(path), path), _making(path, recipe, imported))
        written = exporters.write_all(target, settings.export, work.exports, settings.allow_lossy, console)
    return ForeignResult(**dict(imported), exports=written)


def _making(path: Path, recipe: Recipe, imported: importers.ImportResult) -> Making:
    """How the packed model was made, for its card."""
    options = [
        f" --{field.replace('_', '-')} {bits}"
        for field in ("activation_bits", "kv_bits")
        if (bits := _given_bits(recipe.calibrate, field)) is not None
    ]
    lossy = " --allow-lossy" if recipe.pack.allow_lossy else ""
    effect = (
        f"Scales of {len(imported.lossy)} matrices were rounded." if imported.lossy else "Every weight is as it was."
    )
    command = f"edgerazor pack {shlex.quote(path.name)}{''.join(options)}{lossy}"
    return Making("import", (command,), notes=(effect, *imported.notes))


def _given_bits(settings: Calibrate, field: str) -> int | None:
    """Bits that the user gave; None where it is only the default for models that are trained here."""
    return getattr(settings, field) if field in settings.model_fields_set else None


def _is_import(folder: Path) -> bool:
    """Whether a packed folder was made of somebody else's model."""
    try:
        return packed.PackedModel.open(folder).header.provenance.get("source") == "import"
    except UserError:
        return False
