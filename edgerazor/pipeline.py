"""The order of the stages: skip what is up to date, refuse what is stale or foreign, run a missing input.

Redoing a stage that costs minutes is nothing to ask about. Training is: whatever would throw away a student, or go on
with its checkpoint under other settings, is refused with the two values unless `--force` is given. What is refused
is refused before anything is written.

Where a launcher (torchrun, accelerate launch) started several processes, all of them calibrate, train and evaluate; the
other stages are the main process's alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pydantic import BaseModel, ValidationError

from edgerazor import devices, exporters
from edgerazor import recipe as recipes
from edgerazor.console import Console, duration, is_main_process
from edgerazor.errors import UserError, usage_error
from edgerazor.job import JobContext
from edgerazor.recipe import Recipe
from edgerazor.stage import Stage
from edgerazor.stages import bench, calibrate, distill, eval, pack
from edgerazor.training import BudgetChoice, budget_choice
from edgerazor.workdir import WorkDir

#: The five in their order.
STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (calibrate.STAGE, distill.STAGE, pack.STAGE, eval.STAGE, bench.STAGE)
}


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
    stage, unresolved = STAGES[name], JobContext(recipe, work, console)
    if not (is_main_process() or (stage.on_all_processes and devices.process_count() > 1)):
        return None
    _ = unresolved.teacher_fingerprint  # a model that is not there is refused before a folder is made
    with work.lock() if is_main_process() else nullcontext():
        if is_main_process():
            work.claim()
            work.recover()
        context, choice = resolve(stage, unresolved, force)
        refuse(stage, context, force)
        if stage.on_all_processes:
            devices.join_processes(context.device)
            devices.wait_for_everyone()  # all of them have looked at what is there
        if is_main_process():
            work.write_recipe(recipes.dump(recipe_to_keep(stage, unresolved)))
            if choice is not None:
                budget_choice.store(choice, work)
        for needed in needed_by(stage, context):
            run_before(stage, needed, context)
        result: BaseModel = stage.deliver(context, run_one(stage, context, force))
        return result


def resolve(stage: Stage, context: JobContext, force: bool) -> tuple[JobContext, BudgetChoice | None]:
    """The job with what is best for its model and budget, of the settings that were not asked for, for all stages.

    Raises:
        UserError: the model cannot be read.
    """
    context = with_rotation(stage, context, force)
    before, console = budget_choice.stored(context.work), context.console
    choice = budget_choice.choose(context, None if force and stage.decides_student else before)
    if choice is None:
        return context, None
    if choice != before:
        for reason in choice.reasons:
            console.say(reason)
    elif stage.name == distill.NAME and context.work.manifest(distill.NAME) is None:
        console.say(f"The settings are those that were chosen for the budget before ({context.work.budget_file}).")
    recipe, chosen = budget_choice.apply(context.recipe, choice)
    return context.resolved(recipe, chosen), choice


def with_rotation(stage: Stage, context: JobContext, force: bool) -> JobContext:
    """The job with the rotation of the plan that is there, else the best, where the recipe says nothing of it."""
    recipe = context.recipe
    if "rotation" in recipe.calibrate.model_fields_set:
        return context
    plan = None if force and stage.decides_student else context.plan_if_any()
    if plan is not None:
        rotation = plan.rotation
    elif all(exporters.find(name).rotated for name in recipe.pack.export):
        rotation = context.default_rotation
    else:
        rotation = None
    if rotation and plan is None and stage.name not in (eval.STAGE.name, bench.STAGE.name):
        context.console.say_once(
            "rotation: weights and inputs by a signed block Hadamard matrix (`--rotation none` for exports but hf)"
        )
    return context.with_rotation(rotation)


def run_all(recipe: Recipe, work: WorkDir, console: Console, force: bool = False) -> None:
    """All five stages in order."""
    for name in stages_of(recipe):
        run(name, recipe, work, console, force)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe needs; rounding the teacher needs no training, and most often no calibration."""
    return [name for name, stage in STAGES.items() if stage.takes_part(recipe)]


def needed_by(stage: Stage, context: JobContext) -> Iterator[Stage]:
    """The stages that a stage reads and that may be run without asking."""
    for name in stage.needs:
        if not STAGES[name].stands_alone(context):
            yield STAGES[name]


def run_before(stage: Stage, needed: Stage, context: JobContext) -> None:
    """Run a stage that another one needs, on the processes that it takes; the others that take part wait for it."""
    if is_main_process() or needed.on_all_processes:
        run_one(needed, context, force=False)
    if stage.on_all_processes:
        devices.wait_for_everyone()


def run_one(stage: Stage, context: JobContext, force: bool) -> BaseModel:
    """One stage, unless it is up to date, on all processes that take part in it."""
    inputs, work, console = stage.inputs(context), context.work, context.console
    finished = None if force else earlier_result(stage, inputs, work)
    if stage.on_all_processes:
        finished = devices.of_main_process(finished)
    if finished:
        console.say(f"{stage.name} is up to date, skipping (--force to redo)")
        return finished
    if work.has_damaged_manifest(stage.name):
        console.warn(f"{work.manifest_file(stage.name)} is damaged, so {stage.name} is not taken for finished.")
    began = time.monotonic()
    console.say(f"{stage.name}: {stage.describe(context)}")
    if not force:
        stage.check_continuation(context, inputs)
    with common_folder(stage, work, force) as place:
        result = stage.run(context.at(place, fresh=force))
        if is_main_process():
            section = getattr(context.recipe, stage.name).model_dump(mode="json")
            place.finish(stage.name, inputs, section, result, time.monotonic() - began)
    if stage.on_all_processes:
        devices.wait_for_everyone()
    return result


@contextmanager
def common_folder(stage: Stage, work: WorkDir, force: bool) -> Iterator[WorkDir]:
    """`new_folder` of the main process, for all processes that take part."""
    if stage.manages_folder or not stage.on_all_processes or devices.process_count() == 1:
        with new_folder(stage, work, force) as place:
            yield place
        return
    with new_folder(stage, work, force) if is_main_process() else nullcontext(work) as place:
        folder = devices.of_main_process(place.folder(stage.name))
        yield WorkDir(work.path, {stage.name: folder})


def new_folder(stage: Stage, work: WorkDir, force: bool) -> AbstractContextManager[WorkDir]:
    """The job in which a stage is done again; what it made before stays in its place until that is whole."""
    if stage.manages_folder:
        return nullcontext(work)
    if force:
        work.forget_progress(stage.name)
    return work.replacing(stage.name, () if force else stage.carried, stage.keeps_progress)


def earlier_result(stage: Stage, inputs: dict[str, str], work: WorkDir) -> BaseModel | None:
    """The result of a stage that is up to date."""
    manifest = work.manifest(stage.name)
    if manifest is None or not work.up_to_date(stage.name, inputs):
        return None
    try:
        return stage.result_model.model_validate(manifest.result)
    except ValidationError:  # written by another version of this program
        return None


def recipe_to_keep(stage: Stage, context: JobContext) -> Recipe:
    """The recipe to keep: measuring on other text does not change what a student was made from."""
    recipe, file = context.recipe, context.work.recipe_file
    if stage.decides_student or not context.training or not file.exists():
        return recipe
    stored = recipes.build(recipes.load(file), f"The recipe {file}")
    sections = ("data", *(stage.name for stage in STAGES.values() if stage.decides_student))
    return recipe.model_copy(update={section: getattr(stored, section) for section in sections})


# --- dry runs ----------------------------------------------------------------------------------


def dry_run(
    name: str,
    recipe: Recipe,
    work: WorkDir,
    console: Console,
    force: bool = False,
    machines: devices.Machines | None = None,
) -> BaseModel:
    """What a stage would do and cost; the working directory stays as it is.

    Args:
        name: of the stage.
        recipe: of the whole job.
        work: the job's folder.
        console: where to talk.
        force: as of `run`.
        machines: that are planned for; None: those that are here.

    Raises:
        UserError: the stage would be refused.
    """
    stage, unresolved = STAGES[name], JobContext(recipe, work, console)
    unresolved.machines = machines
    work.claim()
    work.find()
    context, _ = resolve(stage, unresolved, force)
    refuse(stage, context, force)
    for needed in needed_by(stage, context):
        if earlier_result(needed, needed.inputs(context), work) is None:
            console.say(
                f"{needed.name} would run first{lasting(needed, context)} (see `edgerazor {needed.name} --dry-run`)"
            )
    if not force and earlier_result(stage, stage.inputs(context), work):
        console.say(f"{name} is up to date and would be skipped; with --force it would take:")
    return stage.dry_run(context)


def lasting(stage: Stage, context: JobContext) -> str:
    """How long a stage would take, in words behind its name; empty where nobody can say."""
    seconds = getattr(stage.dry_run(context), "seconds", None)
    return f" and take about {duration(seconds)}" if seconds else ""


# --- what is refused ---------------------------------------------------------------------------


def refuse(stage: Stage, context: JobContext, force: bool) -> None:
    """Refuse what cannot work or would do harm, before anything is written.

    Raises:
        UserError: no such device, formats that cannot give the bits, another model's folder, settings that differ from
            those of the student in it, losses that the model cannot give, data that is not there, no student to pack.
    """
    _ = context.device
    for any_stage in STAGES.values():
        any_stage.check_settings(context)
    refuse_other_model(stage, context)
    if stage.decides_student and not force:
        refuse_other_training(stage, context)
    for needed in needed_by(stage, context):
        needed.check(context)
    stage.check(context)
    stage.inputs(context)


def refuse_other_model(stage: Stage, context: JobContext) -> None:
    """A working directory belongs to one model."""
    recipe, work = context.recipe, context.work
    manifests = [manifest for name in STAGES if (manifest := work.manifest(name))]
    owner = next((manifest.inputs["model"] for manifest in manifests if "model" in manifest.inputs), None)
    if owner in (None, context.teacher_fingerprint):
        return
    theirs = recipes.load(work.recipe_file).get("model") if work.recipe_file.exists() else None
    command = f"edgerazor {stage.name} {recipe.model} --work"
    if theirs == recipe.model:
        raise usage_error(
            f"The files of {recipe.model} have changed since {work.path} was begun.",
            f"Begin again in another folder: `{command} NAME`, or remove {work.path}.",
        )
    own = f"{work.path}-{recipe.model.rstrip('/').split('/')[-1]}"
    raise usage_error(
        f"{work.path} belongs to another model, {theirs or 'whose name is not known'}.",
        f"Give this model a folder of its own: `{command} {own}`.",
    )


def refuse_other_training(stage: Stage, context: JobContext) -> None:
    """Do not let new settings throw away a student, or go on with a checkpoint that was made under others."""
    if not context.training:
        return
    for decisive in (stage, *(STAGES[name] for name in stage.needs)):
        stored = decisive.stored_inputs(context)
        if stored is not None:
            refuse_difference(stored, decisive.inputs(context), context)


def refuse_difference(stored: dict[str, str], now: dict[str, str], context: JobContext) -> None:
    """Name the first input that has changed; those of another stage are compared by name, not by fingerprint."""
    for key in {**now, **stored}:
        before, after = stored.get(key, "absent"), now.get(key, "absent")
        if before != after and key not in STAGES:
            raise UserError(
                f"{context.work.path} holds {context.training} made otherwise: {key} was {shortened(before)}, and is "
                f"{shortened(after)} now.",
                "Ask for the same again, use another folder (--work NAME), or throw it away with --force.",
            )


def shortened(value: str) -> str:
    """A value for a sentence: hashes by their beginning."""
    words = [word[:12] if len(word) == 64 else word for word in value.split()]
    text = " ".join(words)
    return text if len(text) <= 120 else f"{text[:117]}..."
