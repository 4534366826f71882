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

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.console import RenderableType

from edgerazor import calibrated, data, devices, models, student_plan
from edgerazor.allocate import Plan
from edgerazor.calibration import initialization
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.job import JobContext, LoadedModel, ModelOutline
from edgerazor.models import PreTrainedModel
from edgerazor.recipe import Distill, Recipe
from edgerazor.stage import Stage
from edgerazor.student_plan import CALIBRATED_INITS
from edgerazor.training import (
    DistillDryRun,
    DistillResult,
    PlannedTraining,
    ScheduledPhase,
    Student,
    Teacher,
    TeacherEnsemble,
    Trainer,
    TrainingStore,
    checkpoint,
    estimate_training,
    is_limited,
    load_further_teachers,
    make_budget,
    make_phases,
    make_student,
    objective,
    phase_schedule,
    reconstruction,
    report_passes,
    report_teachers,
    result_tables,
    speed_of,
    training_dtype,
)
from edgerazor.workdir import WorkDir, make_folder, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "distill"


def inputs(context: JobContext) -> dict[str, str]:
    """Everything the result depends on.

    `max_time` and how often to save do not change what is trained, and how the sequences of a step are divided among
    processes and micro-batches changes it only in the last digits.
    """
    recipe, manifest = context.recipe, context.work.manifest("calibrate")
    settings = recipe.distill
    skip = ("max_time", "checkpoint_every", "gradient_checkpointing", "batch_size", "accumulation", "phases")
    without_teachers = () if settings.teachers else ("teacher_average",)
    training_settings = context.section_inputs("distill", skip + without_teachers)
    bits = context.nominal_bits(context.plan() if manifest else None)
    training_settings |= {"distill.phases": phase_schedule.describe(settings, bits)} if settings.phases else {}
    training_settings["distill.losses"] = objective.describe(settings.losses, bits)
    training_settings["distill.teachers"] = context.further_teachers_fingerprint
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
    trainer, plan = prepare(context)
    accelerator, settings = trainer.accelerator, recipe.distill
    if accelerator.is_main_process:
        discard_unless_resumable(trainer.store, work, console, context.fresh)
    accelerator.wait_for_everyone()
    report_teachers(recipe.model, settings.teachers, trainer.teachers, trainer.terms, console)
    report_passes(trainer.budget.steps, trainer.rows, trainer.rows_per_step, console)
    trainer.resume(console)
    trainer.run(console)
    result = trainer.result(plan.notation()).model_copy(update={"chosen": context.chosen})
    if accelerator.is_main_process:
        write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def dry_run(context: JobContext) -> DistillDryRun:
    """What would be trained, and about how long it would take: from shapes and the speed of the machine.

    Weights are read only by a plan that looks at them, text only where its length decides how long the training is.
    """
    recipe, settings = context.recipe, context.recipe.distill
    check(recipe)
    outline = context.planning_teacher()
    model, structure = outline.model, outline.structure
    student_plan.check_attention(model, recipe.calibrate)
    planned = context.is_planned()
    plan = context.plan() if planned else context.new_plan(outline)
    phases = scheduled_phases(context, plan, structure.layer_count, placeholders=True)
    objective.open_models(model, model, structure, [term for phase in phases for term in phase.terms])
    length, processes = context.sequence_length(model), devices.process_count()
    rows_per_step = settings.batch_size * settings.accumulation * processes
    rows = None if is_limited(settings) else dry_text(context, length)
    budget = make_budget(settings, rows, rows_per_step, rows_per_step * length)
    phase_schedule.check_steps(phases, budget.steps)
    training = PlannedTraining(
        settings=settings,
        outline=outline,
        plan=plan,
        phases=phases,
        budget=budget,
        length=length,
        rows_per_step=rows_per_step,
        processes=processes,
        teacher_bytes=teacher_bytes(context, outline) if needs_teacher(settings, phases) else 0,
    )
    packed_bytes = context.packed_size(outline, measured=planned)(plan).bytes
    estimate = estimate_training(training, speed_of(context), packed_bytes)
    return estimate.model_copy(update={"chosen": context.chosen})


def dry_text(context: JobContext, length: int) -> data.TokenRows:
    """Rows to train on; made up where the teacher is still to write them."""
    if not has_text(context):
        return placeholder_rows(context, length)
    tokenizer = models.load_tokenizer(context.teacher_folder, context.recipe.trust_remote_code)
    return context.open_text(tokenizer, length)[0]


def teacher_bytes(context: JobContext, outline: ModelOutline) -> int:
    """Bytes of the weights of all teachers in the precision of the training."""
    recipe = context.recipe
    others = [models.outline(source, None, recipe.trust_remote_code) for source in recipe.distill.teachers]
    weights = sum(weight.numel() for model in (outline.model, *others) for weight in model.parameters())
    return weights * training_dtype(recipe.distill, context.device).itemsize


def check(recipe: Recipe) -> None:
    """Refuse losses, layers and initializations that cannot be, before anything that takes time.

    Raises:
        UserError: as `phase_schedule.check` and `reconstruction.check`.
    """
    if recipe.distill.initialise == "random" and recipe.calibrate.init in CALIBRATED_INITS:
        raise usage_error(
            f"A random student cannot begin with the teacher's {recipe.calibrate.init} initialization.",
            "Leave out `calibrate.init`, or leave out `distill.initialise`.",
        )
    reconstruction.check(recipe)
    phase_schedule.check(recipe)


# --- preparation -------------------------------------------------------------------------------


class Preparation(NamedTuple):
    """A training that can start.

    Attributes:
        trainer: before its first step.
        plan: the format of every matrix of its student.
    """

    trainer: Trainer
    plan: Plan


def prepare(context: JobContext, placeholders: bool = False) -> Preparation:
    """Load the teacher, make the student, open the text. A recipe that cannot work is refused here, at the start.

    Args:
        context: of the whole job; its working directory holds calibrate's plan and statistics.
        placeholders: to measure a step: use made-up values for what calibrate has not written yet.

    Raises:
        UserError: the recipe cannot work with this model or text.
    """
    recipe, device = context.recipe, context.device
    settings = recipe.distill
    dtype = training_dtype(settings, device)
    check(recipe)
    devices.join_processes(device)
    accelerator = make_accelerator(device, dtype)
    loaded = context.load_teacher(accelerator.device, dtype)
    model, structure = loaded.model, loaded.structure
    teacher = Teacher(model, structure, structure.head_path, models.logit_shape(model, structure.head_path))
    others = load_further_teachers(settings.teachers, recipe.trust_remote_code, accelerator.device, dtype)
    rows, held_out = open_text(context, loaded, [teacher, *others], placeholders)
    plan = context.new_plan(loaded) if placeholders else context.plan()
    phases = scheduled_phases(context, plan, structure.layer_count, placeholders)
    student = prepare_student(context, loaded, plan, placeholders).to(accelerator.device)
    objective.open_models(student, model, structure, [term for phase in phases for term in phase.terms])
    trainer = Trainer(
        settings=settings,
        accelerator=accelerator,
        student=Student(student, structure, teacher.logit_shape, accelerator),
        teachers=TeacherEnsemble(
            (teacher, *others) if needs_teacher(settings, phases) else (), settings.teacher_average
        ),
        rows=rows,
        held_out=held_out,
        phases=phases,
        store=training_store(context.work, {} if placeholders else inputs(context)),
    )
    phase_schedule.check_steps(phases, trainer.budget.steps)
    return Preparation(trainer, plan)


def scheduled_phases(context: JobContext, plan: Plan, layer_count: int, placeholders: bool) -> list[ScheduledPhase]:
    """The phases of the training, with the layers that losses choose by what calibrate measured of each."""
    if placeholders:
        layer_metrics = objective.placeholder_metrics(layer_count)
    else:
        layer_metrics = calibrated.read_layer_metrics(context.work)
    recipe = context.recipe
    return make_phases(recipe.distill, recipe.model, layer_count, layer_metrics, context.nominal_bits(plan))


def prepare_student(context: JobContext, teacher: LoadedModel, plan: Plan, placeholders: bool) -> PreTrainedModel:
    """The student on the CPU, its matrices fake-quantized as the plan says, from where calibrate lets them begin."""
    structure = teacher.structure
    computing = context.student_settings(plan, structure, placeholders)
    input_scales = context.input_scales(plan, teacher, placeholders)
    initial = None if placeholders else initialization.stored(context, plan)
    student = load_student(context.recipe)
    return make_student(student, structure, plan, computing, context.recipe.distill, input_scales, initial)


def make_accelerator(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """What knows the device, the precision of products and the other processes of a launcher."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one process may train more than once, and not always in the same precision
    return Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no", cpu=device.type == "cpu")


def load_student(recipe: Recipe) -> PreTrainedModel:
    """A float32 copy of the teacher, or a randomly initialised model for the control experiment, on the CPU."""
    if recipe.distill.initialise == "random":
        return models.initialise(recipe.model, recipe.revision, recipe.seed, recipe.trust_remote_code)
    model, _ = models.load(recipe.model, recipe.revision, "cpu", torch.float32, recipe.trust_remote_code)
    return model


def needs_teacher(settings: Distill, phases: Sequence[ScheduledPhase]) -> bool:
    """Whether anything is compared with a teacher: a loss of any phase, reconstruction, or the target of quality."""
    by_losses = any(loss.needs_teacher for phase in phases for _, loss in phase.terms)
    return by_losses or settings.reconstruct is not None or settings.target_kl is not None


def open_text(
    context: JobContext, teacher: LoadedModel, teachers: Sequence[Teacher], placeholders: bool
) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows to train on and held-out rows, no longer than any teacher has positions for.

    With placeholders, where the text is still to be written by the teacher, both are made up.
    """
    length = min(context.sequence_length(teacher.model) for teacher in teachers)
    if placeholders and not has_text(context):
        rows = placeholder_rows(context, length)
        return rows, rows
    # `eval` will know what was held out by the length of the first teacher alone.
    return context.open_text(teacher.tokenizer, length, context.sequence_length(teacher.model))


def has_text(context: JobContext) -> bool:
    """Whether there is text to train on already, or the teacher is still to write it."""
    return bool(context.recipe.data.train) or context.work.generated_text.exists()


def placeholder_rows(context: JobContext, length: int) -> data.TokenRows:
    """Rows of some small token ids, as many as the teacher would write."""
    token_ids = np.arange(max(length, context.recipe.data.generated_tokens), dtype=np.int32) % 16
    return data.TokenRows([token_ids], [1.0], length)


def training_store(work: WorkDir, training_inputs: dict[str, str]) -> TrainingStore:
    """Where the training's files lie in the working directory."""
    return TrainingStore(
        checkpoint=work.checkpoint("current"),
        best=work.student("best"),
        last=work.student("last"),
        metrics=work.metrics_file,
        inputs=training_inputs,
    )


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

    def dry_run(self, context: JobContext) -> DistillDryRun:
        return dry_run(context)

    def show(self, result: DistillResult) -> list[RenderableType]:
        return result_tables(result)


STAGE = DistillStage()
