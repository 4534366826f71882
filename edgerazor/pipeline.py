"""The order of the stages: skip what is up to date, refuse what is stale or foreign, run a missing input.

Redoing a stage that costs minutes is nothing to ask about. Training is: whatever would throw away a student, or go on
with its checkpoint under other settings, is refused with the two values unless `--force` is given.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.recipe import Recipe, dump
from edgerazor.stages import _checkpoint, bench, calibrate, distill, eval, pack
from edgerazor.workdir import WorkDir, recover_folder, write_text

STAGES: dict[str, ModuleType] = {module.NAME: module for module in (calibrate, distill, pack, eval, bench)}
#: stage -> the stages whose results it reads, and that may be run for it without asking
NEEDS = {"calibrate": (), "distill": ("calibrate",), "pack": (), "eval": ("pack",), "bench": ("pack",)}


def run(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool = False) -> BaseModel:
    """Run one stage, and what it needs, in a working directory.

    Args:
        name: of the stage.
        recipe: of the whole job; kept in the working directory for later commands.
        work: the job's folder.
        console: where to talk.
        force: do the stage again although it is up to date, and throw away a student in the way.

    Returns:
        the stage's result, from now or from before.
    """
    with work.lock() if is_main_process() else nullcontext():
        check_owner(recipe, work)
        if is_main_process():
            recover(work)
            write_text(work.recipe_file, dump(recipe))
        return run_needed(name, recipe, work, console, force)


def is_main_process() -> bool:
    """Whether this is the process that writes and talks, where a launcher started several."""
    return int(os.environ.get("RANK", "0")) == 0


def run_all(recipe: Recipe, work: WorkDir, console: Console, force: bool = False) -> dict[str, BaseModel]:
    """All five stages in order."""
    names = [name for name in STAGES if not (recipe.pack.source == "teacher" and name in ("calibrate", "distill"))]
    return {name: run(name, recipe, work, console, force) for name in names}


def run_needed(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> BaseModel:
    """A stage after the stages that it needs."""
    for needed in NEEDS[name]:
        if needed == "calibrate":
            run_first(needed, recipe, work, console, force)
        elif needed == "pack" and not (work.manifest("pack") and work.manifest("distill") is None):
            # A packed model that was rounded without training stands on its own.
            run_needed(needed, recipe, work, console, False)
    return run_one(name, recipe, work, console, force)


def run_first(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> None:
    """Run a stage on the main process while the others wait."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run_one(name, recipe, work, console, force=force and name != "calibrate")
        return
    from accelerate import PartialState

    with PartialState(cpu=recipe.device in ("auto", "cpu")).main_process_first():
        run_one(name, recipe, work, console, force=False)


def run_one(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> BaseModel:
    """One stage, unless it is up to date."""
    stage = STAGES[name]
    protect_student(name, recipe, work, force)
    inputs = stage.inputs(recipe, work)
    manifest = work.manifest(name)
    if not force and manifest and work.up_to_date(name, inputs):
        console.say(f"{name} is up to date, skipping (--force to redo)")
        return result_model(stage).model_validate(manifest.result)
    if name == "distill" and not force:
        refuse_other_checkpoint(inputs, work)
    elif name != "pack":  # pack replaces its folder whole
        work.discard(name)
    began = time.monotonic()
    console.say(f"{name}: {what(name, recipe)}")
    result: BaseModel = stage.run(recipe, work, console)
    if is_main_process():
        section = getattr(recipe, name).model_dump(mode="json")
        work.finish(name, stage.inputs(recipe, work), section, result, time.monotonic() - began)
    return result


def what(name: str, recipe: Recipe) -> str:
    """A few words about what a stage is about to do."""
    return {
        "calibrate": f"{recipe.model} at {recipe.calibrate.bits:g} bits",
        "distill": f"{recipe.model} at {recipe.calibrate.bits:g} bits",
        "pack": "writing the packed model",
        "eval": ", ".join(recipe.eval.tasks) or "held-out text",
        "bench": f"{recipe.bench.rounds} rounds",
    }[name]


def dry_run(name: str, recipe: Recipe, work: WorkDir, console: Console) -> BaseModel:
    """What a stage would do; writes nothing but, for distill, a missing plan."""
    check_owner(recipe, work)
    if name == "distill" and work.manifest("calibrate") is None:
        with work.lock():
            run_one("calibrate", recipe, work, console, force=False)
    result: BaseModel = STAGES[name].dry_run(recipe, work, console)
    return result


def result_model(stage: ModuleType) -> type[BaseModel]:
    """The result class of a stage: `PackResult` of `pack`."""
    found: Any = getattr(stage, f"{stage.NAME.capitalize()}Result")
    return found


# --- what is refused ---------------------------------------------------------------------------


def check_owner(recipe: Recipe, work: WorkDir) -> None:
    """A working directory belongs to one model.

    Raises:
        UserError: it belongs to another.
    """
    manifests = [m for m in (work.manifest(name) for name in STAGES) if m]
    if not manifests or "model" not in manifests[0].inputs:
        return
    from edgerazor import models

    ours = models.fingerprint(models.resolve(recipe.model, recipe.revision))
    if manifests[0].inputs["model"] != ours:
        raise UserError(
            f"{work.path} belongs to another model (its weights' hash begins with {manifests[0].inputs['model'][:8]}, "
            f"that of {recipe.model} with {ours[:8]}).",
            f"Give this model a folder of its own: --work {work.path}-{recipe.model.rstrip('/').split('/')[-1]}",
        )


def protect_student(name: str, recipe: Recipe, work: WorkDir, force: bool) -> None:
    """Do not let new settings of calibrate or distill throw away a training."""
    manifest = work.manifest("distill")
    if force or name not in ("calibrate", "distill") or manifest is None:
        return
    calibrated = work.manifest("calibrate")
    if name == "calibrate" and calibrated:
        refuse_difference(calibrated.inputs, calibrate.inputs(recipe, work), work, "student")
    if name == "distill":
        refuse_difference(manifest.inputs, distill.inputs(recipe, work), work, "student")


def refuse_other_checkpoint(inputs: dict[str, str], work: WorkDir) -> None:
    """A checkpoint goes on only under the settings it was made with."""
    stored = _checkpoint.stored_inputs(work.checkpoint("current"))
    if stored is not None:
        refuse_difference(stored, inputs, work, "interrupted training")


def refuse_difference(stored: dict[str, str], now: dict[str, str], work: WorkDir, thing: str) -> None:
    for key in sorted(stored.keys() | now.keys(), key=lambda key: key in ("calibrate", "student")):
        before, after = stored.get(key, "absent"), now.get(key, "absent")
        if before != after:
            raise UserError(
                f"{work.path} holds the {thing} of another recipe: {key} was {before[:60]}, and is {after[:60]} now.",
                "Ask for the same again, use a new folder (--work NAME), or throw it away with --force.",
            )


def recover(work: WorkDir) -> None:
    """Finish or undo what a killed process left half done."""
    for folder in (work.folder("pack"), work.student("best"), work.student("last"), work.checkpoint("current")):
        recover_folder(folder)
