"""Quantization-aware distillation: train the student's float32 master weights so that their low-bit version copies
the teacher.

The forward pass computes with `decode(encode(weight))`, int8 activations and int8 keys and values, as the packed model
will: codes and scales are exactly those that are packed, products are in `precision` (float32 as packed, or bfloat16
between the layers and float32 for logits), and held-out text is evaluated in the same. The gradient passes straight
through the rounding; nothing is dropped out, whatever the checkpoint's configuration says of its pre-training. The
objective is a weighted sum of losses from `edgerazor/losses`, by default EdgeRazor's CE + EAKLD + LAFD (arXiv
2605.04062).

A training may have phases (scales alone first, then everything), each with a part of the budget, an optimizer and a
schedule of its own; the data go on from phase to phase. How a step is taken, evaluated and saved stands in
`training/trainer.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from rich.console import RenderableType

from edgerazor import data, devices, models, recording, student_plan
from edgerazor.allocate import Plan
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.job import JobContext, ModelOutline
from edgerazor.recipe import Distill, Recipe
from edgerazor.stage import Stage
from edgerazor.student_plan import CALIBRATED_INITS
from edgerazor.training import (
    DistillDryRun,
    DistillResult,
    PlannedTraining,
    ScaleDryRun,
    TeacherEnsemble,
    TrainingStore,
    check_recording,
    check_served_losses,
    check_source,
    checkpoint,
    estimate_training,
    is_limited,
    make_budget,
    make_phases,
    measure_machine,
    memory_bytes,
    memory_choice,
    needs_teacher,
    objective,
    phase_schedule,
    plan_at_scale,
    prepare,
    reconstruction,
    report_passes,
    report_teachers,
    resident_bytes,
    result_tables,
    sharding,
    speed_of,
    student_sizes,
    tracking,
    trained_shape,
    training_dtype,
)
from edgerazor.workdir import WorkDir, make_folder, write_json

NAME = "distill"


def inputs(context: JobContext) -> dict[str, str]:
    """Everything the result depends on.

    `max_time` and how often to save do not change what is trained, and how the sequences of a step are divided among
    processes and micro-batches changes it only in the last digits.
    """
    recipe, manifest = context.recipe, context.work.manifest("calibrate")
    settings = recipe.distill
    skip = (
        *("max_time", "clock", "checkpoint_every", "track", "phases"),
        *("gradient_checkpointing", "batch_size", "accumulation"),
        "recording",  # what it is counts, and not where it lies
        *("teacher", "teacher_source", "served_model", "memory", "cache_rounding"),
    )
    unused: tuple[str, ...] = () if settings.teachers else ("teacher_average",)
    unused += () if settings.optimizer != "adamw" else ("optimizer",)
    training_settings = context.section_inputs("distill", skip + unused)
    bits = context.nominal_bits(context.plan() if manifest else None)
    training_settings |= {"distill.phases": phase_schedule.describe(settings, bits)} if settings.phases else {}
    training_settings["distill.losses"] = objective.describe(settings.losses, bits)
    training_settings["distill.teachers"] = context.further_teachers_fingerprint
    if settings.teacher is not None:
        training_settings["distill.teacher"] = context.other_teacher_fingerprint
    if settings.is_served:
        training_settings["distill.teacher"] = f"on a server: {settings.served_model or 'its only model'}"
    if settings.recording is not None:
        description = recording.read_description(Path(settings.recording))
        training_settings["distill.recording"] = description.fingerprint()
    budget_name, budget = recipe.calibrate.budget()
    return {
        budget_name: str(budget),
        "model": context.teacher_fingerprint,
        "data": context.data_fingerprint,
        "held_out": context.held_out_fingerprint,
        "data.sequence_length": str(recipe.data.sequence_length),
        "data.packing": recipe.data.packing,
        **context.text_inputs,
        "seed": str(recipe.seed),
        "sequences per step": str(settings.batch_size * settings.accumulation * devices.process_count()),
        **training_settings,
        "calibrate": manifest.fingerprint() if manifest else "missing",
    }


def run(context: JobContext) -> DistillResult:
    """Train, from the last checkpoint if there is one, and write the `best` and `last` students.

    Args:
        context: of the whole job; `fresh` discards what an earlier training left, once it is known that this one can
            start.

    Raises:
        UserError: the recipe cannot work with this model or text, the training diverges, or it was interrupted.
    """
    recipe, work, console = context.recipe, context.work, context.console
    check(recipe)
    check_recording(context)
    context = fitting(context)
    recipe = context.recipe
    trainer, plan = prepare(context, inputs(context))
    accelerator, settings = trainer.accelerator, recipe.distill
    if accelerator.is_main_process:
        discard_unless_resumable(trainer.store, work, console, context.fresh)
    accelerator.wait_for_everyone()
    if isinstance(trainer.teachers, TeacherEnsemble):
        report_teachers(recipe.model, settings.teachers, trainer.teachers, trainer.terms, console)
    report_passes(trainer.budget.steps, trainer.rows, trainer.rows_per_step, console)
    trainer.resume(console)
    trainer.run(console)
    result = trainer.result(plan.notation())
    passes = trainer.rows.passes(result.steps * trainer.rows_per_step) if len(trainer.rows) else None
    more = {"chosen": context.chosen, "passes": None if passes is None else round(passes, 3)}
    result = result.model_copy(update=more)
    if accelerator.is_main_process:
        write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def dry_run(context: JobContext) -> DistillDryRun | ScaleDryRun:
    """What would be trained, and about how long it would take: from shapes and the speed of the machine.

    Weights are read only by a plan that looks at them, text only where its length decides how long the training is.
    """
    check(context.recipe)
    check_recording(context)
    context = fitting(context)
    outline = context.planning_teacher()
    student_plan.check_attention(outline.model, context.recipe.calibrate)
    planned = context.is_planned()
    plan = context.plan() if planned else context.new_plan(outline)
    training = planned_training(context, outline, plan)
    if context.machines is not None:
        return dry_run_at_scale(context, training, context.machines)
    packed_bytes = context.packed_size(outline, measured=planned)(plan).bytes
    estimate = estimate_training(training, speed_of(context), packed_bytes)
    return estimate.model_copy(update={"chosen": context.chosen})


def dry_run_at_scale(context: JobContext, training: PlannedTraining, machines: devices.Machines) -> ScaleDryRun:
    """What the training would take of each of many processes, by shapes; on GPUs in the dtype that they are fast at.

    Raises:
        UserError: it cannot be spread over processes.
    """
    settings = context.recipe.distill
    check(context.recipe, machines.world_size)
    sharding.check(settings)
    if machines.gpu_memory is not None and settings.precision != "float32":
        before = training.dtype.itemsize
        scaled = training.teacher_bytes * torch.bfloat16.itemsize // before
        training = dataclasses.replace(training, dtype=torch.bfloat16, teacher_bytes=scaled)
    weight_bytes, trained = student_sizes(training)
    shape = trained_shape(training, weight_bytes // 4, trained)
    machine = measure_machine(context.device, training.dtype) if machines.gpu_memory is None else None
    return plan_at_scale(shape, settings, machines, machine, training.plan.notation())


def planned_training(context: JobContext, outline: ModelOutline, plan: Plan) -> PlannedTraining:
    """The training of a recipe, of shapes alone.

    Args:
        context: of the job.
        outline: of the teacher.
        plan: of the student.
    """
    recipe, settings = context.recipe, context.recipe.distill
    model, structure = outline.model, outline.structure
    layer_metrics = objective.placeholder_metrics(structure.layer_count)
    phases = make_phases(settings, recipe.model, structure.layer_count, layer_metrics, context.nominal_bits(plan))
    terms = [term for phase in phases for term in phase.terms]
    objective.open_models(model, model, structure, terms)
    if settings.teacher is not None:
        other = models.outline(settings.teacher, None, recipe.trust_remote_code)
        objective.open_other_teacher(model, other, terms)
    if settings.is_served:
        check_served_losses(terms)
    length, processes = context.sequence_length(model), devices.process_count()
    rows_per_step = settings.batch_size * settings.accumulation * processes
    rows = None if is_limited(settings) else dry_text(context, length)
    budget = make_budget(settings, rows, rows_per_step, rows_per_step * length)
    phase_schedule.check_steps(phases, budget.steps)
    dtype = training_dtype(settings, context.device)
    return PlannedTraining(
        settings=settings,
        outline=outline,
        plan=plan,
        phases=phases,
        budget=budget,
        length=length,
        rows_per_step=rows_per_step,
        processes=processes,
        computing=context.student_settings(plan, structure, imagined=True),
        dtype=dtype,
        device=context.device,
        teacher_bytes=resident_bytes(context, outline, dtype) if needs_teacher(settings, phases) else 0,
    )


def fitting(context: JobContext) -> JobContext:
    """The job with as little given up as `distill.memory` asks for.

    Raises:
        UserError: it takes more in any case.
    """
    if context.recipe.distill.memory is None:
        return context

    def with_settings(settings: Distill) -> JobContext:
        return context.resolved(context.recipe.model_copy(update={"distill": settings}), context.chosen)

    outline = context.planning_teacher()
    plan = context.plan() if context.is_planned() else context.new_plan(outline)

    def estimate(settings: Distill) -> int:
        return memory_bytes(planned_training(with_settings(settings), outline, plan))

    devices.join_processes(context.device)
    fitted = memory_choice.fit(context.recipe.distill, context.device, estimate, context.console)
    return with_settings(devices.of_main_process(fitted))


def dry_text(context: JobContext, length: int) -> data.TokenRows:
    """Rows to train on; made up where the teacher is still to write them."""
    if not has_text(context):
        return placeholder_rows(context, length)
    tokenizer = models.load_tokenizer(context.teacher_folder, context.recipe.trust_remote_code)
    return context.open_text(tokenizer, length)[0]


def has_text(context: JobContext) -> bool:
    """Whether there is text to train on already, or the teacher is still to write it."""
    return bool(context.recipe.data.train) or context.work.generated_text.exists()


def placeholder_rows(context: JobContext, length: int) -> data.TokenRows:
    """Rows of some small token ids, as many as the teacher would write."""
    token_ids = np.arange(max(length, context.recipe.data.generated_tokens), dtype=np.int32) % 16
    return data.TokenRows([token_ids], [1.0], length)


def check(recipe: Recipe, processes: int | None = None) -> None:
    """Refuse losses, layers and initializations that cannot be, before anything that takes time.

    Args:
        recipe: of the job.
        processes: that would train together; None: those of the launcher.

    Raises:
        UserError: as `phase_schedule.check` and `reconstruction.check`.
    """
    if recipe.distill.initialise == "random" and recipe.calibrate.init in CALIBRATED_INITS:
        raise usage_error(
            f"A random student cannot begin with the teacher's {recipe.calibrate.init} initialization.",
            "Leave out `calibrate.init`, or leave out `distill.initialise`.",
        )
    if recipe.distill.optimizer == "adafactor" and (processes or devices.process_count()) > 1:
        raise usage_error(
            "With `distill.optimizer: adafactor` weights change before processes could add up their gradients.",
            "Use adamw, or a single process.",
        )
    reconstruction.check(recipe)
    phase_schedule.check(recipe)
    check_source(recipe.distill)
    tracking.check(recipe.distill)


def discard_unless_resumable(store: TrainingStore, work: WorkDir, console: Console, fresh: bool) -> None:
    """Discard the stage's folder, unless it holds a checkpoint to resume from and the students that belong to it.

    Args:
        store: the files of the training.
        work: the working directory.
        console: says why a training starts again.
        fresh: discard the folder in any case.
    """
    progress = None if fresh else store.stored_progress()
    if progress and progress.best is not None and not store.has_students():
        console.say("distill starts again, because a student that it made is missing")
        progress = None
    if progress is None:
        work.discard(NAME)
    work.manifest_file(NAME).unlink(missing_ok=True)
    make_folder(work.folder(NAME))


# --- the stage ---------------------------------------------------------------------------------


class DistillStage(Stage):
    """`edgerazor distill`."""

    name = NAME
    result_model = DistillResult
    needs = ("calibrate",)
    decides_student = True
    on_all_processes = True
    manages_folder = True  # it goes on in it

    def takes_part(self, recipe: Recipe) -> bool:
        return recipe.pack.source != "teacher"

    def describe(self, context: JobContext) -> str:
        return f"{context.recipe.model} {context.budget_in_words}"

    def inputs(self, context: JobContext) -> dict[str, str]:
        return inputs(context)

    def stored_inputs(self, context: JobContext) -> dict[str, str] | None:
        manifest = context.work.manifest(NAME)
        return manifest.inputs if manifest else checkpoint.stored_inputs(context.work.checkpoint("current")) or {}

    def check(self, context: JobContext) -> None:
        check(context.recipe)
        check_recording(context)

    def check_continuation(self, context: JobContext, inputs: dict[str, str]) -> None:
        """A training goes on only with the very plan and statistics that it began with."""
        stored = checkpoint.stored_inputs(context.work.checkpoint("current"))
        if stored is not None and stored.get("calibrate") != inputs["calibrate"]:
            raise UserError(
                f"calibrate was done again in {context.work.path} with another outcome than the one the training there "
                "began with.",
                "Use another folder (--work NAME), or start the training again with `edgerazor distill --force`.",
            )

    def run(self, context: JobContext) -> DistillResult:
        return run(context)

    def dry_run(self, context: JobContext) -> DistillDryRun | ScaleDryRun:
        return dry_run(context)

    def show(self, result: DistillResult) -> list[RenderableType]:
        return result_tables(result)


STAGE = DistillStage()
