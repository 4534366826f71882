"""The order of the stages: skip what is up to date, refuse what is stale or foreign, run a missing input.

Redoing a stage that costs minutes is nothing to ask about. Training is: whatever would throw away a student, or go on
with its checkpoint under other settings, is refused with the two values unless `--force` is given. What is refused
is refused before anything is written.

Where a launcher (torchrun, accelerate launch) started several processes, all of them train; the other stages are the
main process's alone.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from edgerazor import allocate, exporters, models
from edgerazor import job as jobs
from edgerazor import recipe as recipes
from edgerazor.console import Console, is_main_process, megabytes
from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Recipe
from edgerazor.stages import bench, calibrate, distill, eval, pack
from edgerazor.training import checkpoint
from edgerazor.workdir import WorkDir

STAGES: dict[str, ModuleType] = {module.NAME: module for module in (calibrate, distill, pack, eval, bench)}


def run(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool = False) -> BaseModel | None:
    """Run one stage, and what it needs, in a working directory.

    Args:
        name: of the stage.
        recipe: of the whole job; kept in the working directory for later commands.
        work: the job's folder.
        console: where to talk.
        force: do the stage again although it is up to date, and throw away a student in the way.

    Returns:
        the stage's result, from now or from before; None on the processes that only help with training.

    Raises:
        UserError: it cannot be done as asked; then nothing has changed, unless it failed on the way.
    """
    if name != "distill" and not is_main_process():
        return None
    jobs.teacher_fingerprint(recipe)  # a model that is not there is refused before a folder is made
    with work.lock() if is_main_process() else nullcontext():
        if is_main_process():
            work.claim()
            work.recover()
        refuse(name, recipe, work, force)
        if is_main_process():
            work.write_recipe(recipes.dump(to_remember(name, recipe, work)))
        result = run_needed(name, recipe, work, console, force)
        if name == "pack" and recipe.pack.export and isinstance(result, pack.PackResult):
            return pack.export(result, recipe, work, console)
        return result


def run_all(recipe: Recipe, work: WorkDir, console: Console, force: bool = False) -> None:
    """All five stages in order."""
    for name in stages_of(recipe):
        run(name, recipe, work, console, force)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe needs; rounding the teacher needs no training, and most often no calibration."""
    if recipe.pack.source != "teacher":
        return list(STAGES)
    without = {"distill"} if jobs.needs_calibration(recipe.calibrate) else {"calibrate", "distill"}
    return [name for name in STAGES if name not in without]


def run_needed(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> BaseModel:
    """A stage, after the stages that it reads and that may be run without asking."""
    if name == "distill":
        run_first("calibrate", recipe, work, console)
    elif name in ("eval", "bench") and not stands_alone(work):
        run_one("pack", recipe, work, console, False)
    return run_one(name, recipe, work, console, force)


def stands_alone(work: WorkDir) -> bool:
    """Whether there is a packed model that was rounded without training, so that it needs nothing before it."""
    packed = work.manifest("pack")
    return packed is not None and not has_training(work) and work.up_to_date("pack", packed.inputs)


def run_first(name: str, recipe: Recipe, work: WorkDir, console: Console) -> None:
    """Run a stage on the main process while the others wait."""
    if jobs.processes() > 1:
        jobs.join_processes(jobs.device_of(recipe))
    if is_main_process():
        run_one(name, recipe, work, console, force=False)
    jobs.wait_for_everyone()


def run_one(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> BaseModel:
    """One stage, unless it is up to date."""
    stage = STAGES[name]
    inputs = stage.inputs(recipe, work)
    if not force and (finished := earlier_result(name, inputs, work)):
        console.say(f"{name} is up to date, skipping (--force to redo)")
        return finished
    if work.damaged(name):
        console.warn(f"{work.manifest_file(name)} is damaged, so {name} is not taken for finished.")
    began = time.monotonic()
    console.say(f"{name}: {what(name, recipe)}")
    if name == "distill" and not force:
        refuse_other_plan(inputs, work)
    with making(name, work, force) as job:
        result: BaseModel = (
            distill.run(recipe, job, console, fresh=force) if name == "distill" else stage.run(recipe, job, console)
        )
        if is_main_process():
            section = getattr(recipe, name).model_dump(mode="json")
            job.finish(name, inputs, section, result, time.monotonic() - began)
    return result


def making(name: str, work: WorkDir, force: bool) -> AbstractContextManager[WorkDir]:
    """The job in which a stage is done again; what it made before stays in its place until that is whole."""
    if name in ("distill", "pack"):  # the one goes on in its folder, the other replaces its own
        return nullcontext(work)
    if force:
        work.forget_progress(name)
    carry = calibrate.CARRIED if name == "calibrate" and not force else ()
    return work.replacing(name, carry, keep_progress=name == "bench")


def earlier_result(name: str, inputs: dict[str, str], work: WorkDir) -> BaseModel | None:
    """The result of a stage that is up to date."""
    manifest = work.manifest(name)
    if manifest is None or not work.up_to_date(name, inputs):
        return None
    try:
        return result_model(STAGES[name]).model_validate(manifest.result)
    except ValidationError:  # written by another version of this program
        return None


def what(name: str, recipe: Recipe) -> str:
    """A few words about what a stage is about to do."""
    return {
        "calibrate": f"{recipe.model} {budget(recipe)}",
        "distill": f"{recipe.model} {budget(recipe)}",
        "pack": "writing the packed model",
        "eval": ", ".join(recipe.eval.tasks) or "held-out text",
        "bench": f"{recipe.bench.rounds} round{'s' * (recipe.bench.rounds > 1)}",
    }[name]


def budget(recipe: Recipe) -> str:
    """How large the packed model may be, in words."""
    name, value = recipe.calibrate.budget()
    return f"in {megabytes(value)}" if name == "target_size" else f"at {value:g} {name.replace('_', ' ')}"


def result_model(stage: ModuleType) -> type[BaseModel]:
    """The result class of a stage: `PackResult` of `pack`."""
    found: Any = getattr(stage, f"{stage.NAME.capitalize()}Result")
    return found


def to_remember(name: str, recipe: Recipe, work: WorkDir) -> Recipe:
    """The recipe to keep: measuring on other text does not change what a student was made from."""
    if name in ("calibrate", "distill") or not has_training(work) or not work.recipe_file.exists():
        return recipe
    stored = recipes.build(recipes.load(work.recipe_file), f"The recipe {work.recipe_file}")
    return recipe.model_copy(update={part: getattr(stored, part) for part in ("data", "calibrate", "distill")})


# --- dry runs ----------------------------------------------------------------------------------


def dry_run(name: str, recipe: Recipe, work: WorkDir, console: Console, force: bool = False) -> BaseModel:
    """What a stage would do and cost; the working directory stays as it is.

    Raises:
        UserError: the stage would be refused.
    """
    work.claim()
    work.find()
    refuse(name, recipe, work, force)
    stage = STAGES[name]
    before = {"distill": "calibrate", "eval": "pack", "bench": "pack"}.get(name)
    needed = before is not None and not (before == "pack" and stands_alone(work))
    if before and needed and earlier_result(before, STAGES[before].inputs(recipe, work), work) is None:
        console.say(f"{before} would run first (see `edgerazor {before} --dry-run`)")
    if not force and earlier_result(name, stage.inputs(recipe, work), work):
        console.say(f"{name} is up to date and would be skipped; with --force it would take:")
    result: BaseModel = stage.dry_run(recipe, work, console)
    return result


# --- what is refused ---------------------------------------------------------------------------


def refuse(name: str, recipe: Recipe, work: WorkDir, force: bool) -> None:
    """Refuse what cannot work or would do harm, before anything is written.

    Raises:
        UserError: no such device, formats that cannot give the bits, another model's folder, settings that differ from
            those of the student in it, losses that the model cannot give, data that is not there, no student to pack.
    """
    jobs.device_of(recipe)
    allocate.check(recipe.calibrate)
    if recipe.pack.export:
        exporters.check(recipe.pack.export, models.resolve(recipe.model, recipe.revision))
    refuse_other_model(name, recipe, work)
    if name in ("calibrate", "distill"):
        if not force:
            refuse_other_training(name, recipe, work)
        if name == "distill":
            distill.check(recipe)
    elif name == "pack" or not stands_alone(work):
        pack.source_of(recipe, work)
    STAGES[name].inputs(recipe, work)


def refuse_other_model(name: str, recipe: Recipe, work: WorkDir) -> None:
    """A working directory belongs to one model."""
    owner = next((m.inputs["model"] for m in map(work.manifest, STAGES) if m and "model" in m.inputs), None)
    if owner in (None, jobs.teacher_fingerprint(recipe)):
        return
    theirs = recipes.load(work.recipe_file).get("model") if work.recipe_file.exists() else None
    if theirs == recipe.model:
        raise usage_error(
            f"The files of {recipe.model} have changed since {work.path} was begun.",
            f"Begin again in another folder: `edgerazor {name} {recipe.model} --work NAME`, or remove {work.path}.",
        )
    own = f"{work.path}-{recipe.model.rstrip('/').split('/')[-1]}"
    raise usage_error(
        f"{work.path} belongs to another model, {theirs or 'whose name is not known'}.",
        f"Give this model a folder of its own: `edgerazor {name} {recipe.model} --work {own}`.",
    )


def has_training(work: WorkDir) -> bool:
    """Whether there is a student or an interrupted training."""
    return work.manifest("distill") is not None or work.checkpoint("current").exists()


def refuse_other_training(name: str, recipe: Recipe, work: WorkDir) -> None:
    """Do not let new settings throw away a student, or go on with a checkpoint that was made under others."""
    if not has_training(work):
        return
    manifest, calibrated = work.manifest("distill"), work.manifest("calibrate")
    thing = "a student" if manifest else "an interrupted training"
    if name == "distill":
        stored = manifest.inputs if manifest else checkpoint.stored_inputs(work.checkpoint("current"))
        refuse_difference(stored or {}, distill.inputs(recipe, work), work, thing)
    if calibrated:
        refuse_difference(calibrated.inputs, calibrate.inputs(recipe, work), work, thing)


def refuse_difference(stored: dict[str, str], now: dict[str, str], work: WorkDir, thing: str) -> None:
    for key in {**now, **stored}:
        before, after = stored.get(key, "absent"), now.get(key, "absent")
        if before != after and key != "calibrate":  # calibrate's own inputs are compared by name
            raise UserError(
                f"{work.path} holds {thing} made otherwise: {key} was {shortened(before)}, and is {shortened(after)} "
                "now.",
                "Ask for the same again, use another folder (--work NAME), or throw it away with --force.",
            )


def refuse_other_plan(inputs: dict[str, str], work: WorkDir) -> None:
    """A training goes on only with the very plan and statistics that it began with."""
    stored = checkpoint.stored_inputs(work.checkpoint("current"))
    if stored is not None and stored.get("calibrate") != inputs["calibrate"]:
        raise UserError(
            f"calibrate was done again in {work.path} with another outcome than the one the training there began with.",
            "Use another folder (--work NAME), or start the training again with `edgerazor distill --force`.",
        )


def shortened(value: str) -> str:
    """A value for a sentence: hashes by their beginning."""
    words = [word[:12] if len(word) == 64 else word for word in value.split()]
    text = " ".join(words)
    return text if len(text) <= 120 else f"{text[:117]}..."
