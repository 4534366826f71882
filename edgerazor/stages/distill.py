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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.console import RenderableType

from edgerazor import calibrated, data, devices, models, recording, student_plan
from edgerazor.allocate import Plan
from edgerazor.calibration import initialization
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.job import JobContext, ModelOutline
from edgerazor.models import PreTrainedModel
from edgerazor.recipe import Distill, Recipe
from edgerazor.stage import Stage
from edgerazor.student_plan import CALIBRATED_INITS
from edgerazor.training import (
    DistillDryRun,
    DistillResult,
    PlannedTraining,
    PreparedTeacher,
    RecordedTeacher,
    ScheduledPhase,
    Student,
    TeacherEnsemble,
    Trainer,
    TrainingStore,
    check_losses,
    check_sequences,
    check_served_losses,
    checkpoint,
    estimate_training,
    fitting_inputs,
    is_limited,
    make_budget,
    make_phases,
    make_student,
    objective,
    open_teacher,
    phase_schedule,
    reconstruction,
    report_passes,
    report_teachers,
    resident_bytes,
    result_tables,
    sharding,
    speed_of,
    teacher_outlines,
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
    skip = (
        *("max_time", "checkpoint_every", "gradient_checkpointing", "batch_size", "accumulation", "phases"),
        "recording",  # what it is counts, and not where it lies
        *("teacher", "teacher_source", "served_model"),
    )
    without_teachers = () if settings.teachers else ("teacher_average",)
    training_settings = context.section_inputs("distill", skip + without_teachers)
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
    trainer, plan = prepare(context)
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


def dry_run(context: JobContext) -> DistillDryRun:
    """What would be trained, and about how long it would take: from shapes and the speed of the machine.

    Weights are read only by a plan that looks at them, text only where its length decides how long the training is.
    """
    recipe, settings = context.recipe, context.recipe.distill
    check(recipe)
    check_recording(context)
    outline = context.planning_teacher()
    model, structure = outline.model, outline.structure
    student_plan.check_attention(model, recipe.calibrate)
    planned = context.is_planned()
    plan = context.plan() if planned else context.new_plan(outline)
    phases = scheduled_phases(context, plan, structure.layer_count, placeholders=True)
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
    training = PlannedTraining(
        settings=settings,
        outline=outline,
        plan=plan,
        phases=phases,
        budget=budget,
        length=length,
        rows_per_step=rows_per_step,
        processes=processes,
        teacher_bytes=resident_bytes(context, outline, training_dtype(settings, context.device))
        if needs_teacher(settings, phases)
        else 0,
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
    check_source(recipe.distill)


def check_source(settings: Distill) -> None:
    """Refuse a source of the teacher's outputs that does not go with something else.

    Raises:
        UserError: which, and why.
    """
    elsewhere = settings.teacher is not None or settings.teacher_source != "resident"
    if settings.recording is not None and settings.reconstruct is not None:
        raise usage_error(
            "Layers are reconstructed from what the teacher's own layers give, which a recording does not hold.",
            "Leave out `distill.reconstruct` (--reconstruct), or `distill.recording` (--recording).",
        )
    if elsewhere and settings.reconstruct is not None:
        raise usage_error(
            "Layers are reconstructed from those of the recipe's own model in memory.",
            "Leave out `distill.reconstruct` (--reconstruct), or `distill.teacher` and `distill.teacher_source`.",
        )
    if elsewhere and settings.recording is not None:
        raise usage_error(
            "A recording takes the teacher's place, so no teacher computes.",
            "Leave out `distill.recording` (--recording), or `distill.teacher` and `distill.teacher_source`.",
        )
    if settings.is_served and (settings.teacher is not None or settings.teachers):
        raise usage_error(
            "A served teacher is the one that its server computes, and the only one.",
            "Name it with `distill.served_model`; leave out `distill.teacher` and `distill.teachers`.",
        )
    if settings.served_model is not None and not settings.is_served:
        raise usage_error(
            "`distill.served_model` names a model of a server, and there is none.",
            "Give its address: `distill.teacher_source: http://host:8000/v1`.",
        )


def check_recording(context: JobContext) -> None:
    """Refuse a recording that does not fit the job, as far as that can be said without reading text or weights.

    Raises:
        UserError: there is none, it is of something else, or a loss cannot be computed from it.
    """
    recipe, settings, work = context.recipe, context.recipe.distill, context.work
    if settings.recording is None:
        return
    folder = Path(settings.recording)
    description = recording.read_description(folder)
    source = f"--work {work.path}" if work.recipe_file.exists() else f"{recipe.model} --data FILE"
    length = min(context.sequence_length(model) for model in teacher_outlines(context))
    inputs = fitting_inputs(context, length)
    recording.check_fit(description, folder, inputs, f"edgerazor record {source} --out NAME")
    measured = work.manifest("calibrate") is not None
    layer_count = context.teacher_outline.structure.layer_count
    plan = context.plan() if measured else None
    layer_metrics = calibrated.read_layer_metrics(work) if measured else objective.placeholder_metrics(layer_count)
    for phase in make_phases(settings, recipe.model, layer_count, layer_metrics, context.nominal_bits(plan)):
        check_losses(phase.terms, description, folder, measured)


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
    check_recording(context)
    sharded = sharding.is_wanted()
    if sharded:
        sharding.check(settings)
    is_resident = settings.recording is None and not settings.is_served and settings.teacher_source == "resident"
    # what will be sharded moves to the device layer by layer
    teacher_device = torch.device("cpu") if sharded and is_resident else accelerator.device
    teacher = open_teacher(context, teacher_device, dtype)
    structure = teacher.outline.structure
    rows, held_out = open_text(context, teacher, placeholders)
    planned = teacher.outline if teacher.is_loaded or not placeholders else context.planning_teacher()
    plan = context.new_plan(planned) if placeholders else context.plan()
    phases = scheduled_phases(context, plan, structure.layer_count, placeholders)
    student = load_student(recipe)
    logit_shape = models.logit_shape(teacher.outline.model if teacher.is_loaded else student, structure.head_path)
    student = prepare_student(context, student, teacher.outline, plan, placeholders)
    student = student if sharded else student.to(accelerator.device)
    terms = [term for phase in phases for term in phase.terms]
    objective.open_models(student, teacher.outline.model if teacher.is_loaded else None, structure, terms)
    if teacher.other is not None:
        objective.open_other_teacher(student, teacher.other, terms)
    if settings.is_served:
        check_served_losses(terms)
    if sharded and isinstance(teacher.source, TeacherEnsemble):
        for one in teacher.source:
            layers_path = models.structure(one.model).layers_path
            sharding.shard(one.model, layers_path, accelerator.device)
    trainer = Trainer(
        settings=settings,
        accelerator=accelerator,
        student=Student(student, structure, logit_shape, accelerator, sharded),
        teachers=teacher.source if needs_teacher(settings, phases) else TeacherEnsemble(()),
        rows=rows,
        held_out=held_out,
        phases=phases,
        store=training_store(context.work, {} if placeholders else inputs(context)),
    )
    phase_schedule.check_steps(phases, trainer.budget.steps)
    if isinstance(trainer.teachers, RecordedTeacher):
        recorded, steps = trainer.teachers.recording, trainer.budget.steps
        check_losses(terms, recorded.description, recorded.folder, layers_known=True)
        needed = None if steps is None else steps * trainer.rows_per_step
        check_sequences(recorded, rows, held_out, needed, settings.evaluate_sequences)
    return Preparation(trainer, plan)


def scheduled_phases(context: JobContext, plan: Plan, layer_count: int, placeholders: bool) -> list[ScheduledPhase]:
    """The phases of the training, with the layers that losses choose by what calibrate measured of each."""
    if placeholders:
        layer_metrics = objective.placeholder_metrics(layer_count)
    else:
        layer_metrics = calibrated.read_layer_metrics(context.work)
    recipe = context.recipe
    return make_phases(recipe.distill, recipe.model, layer_count, layer_metrics, context.nominal_bits(plan))


def prepare_student(
    context: JobContext, student: PreTrainedModel, teacher: ModelOutline, plan: Plan, placeholders: bool
) -> PreTrainedModel:
    """The student on the CPU, its matrices fake-quantized as the plan says, from where calibrate lets them begin."""
    structure = teacher.structure
    computing = context.student_settings(plan, structure, placeholders)
    input_scales = context.input_scales(plan, teacher, placeholders)
    initial = None if placeholders else initialization.stored(context, plan)
    return make_student(student, structure, plan, computing, context.recipe.distill, input_scales, initial)


def make_accelerator(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """What knows the device, the precision of products and the other processes of a launcher."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one process may train more than once, and not always in the same precision
    with sharding.hidden_from_accelerate():
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
    context: JobContext, teacher: PreparedTeacher, placeholders: bool
) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows to train on and held-out rows, no longer than any teacher has positions for.

    With placeholders, where the text is still to be written by the teacher, both are made up.
    """
    if placeholders and not has_text(context):
        rows = placeholder_rows(context, teacher.length)
        return rows, rows
    # `eval` will know what was held out by the length of the first teacher alone.
    held_out_length = context.sequence_length(teacher.outline.model)
    return context.open_text(teacher.tokenizer, teacher.length, held_out_length)


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

    def dry_run(self, context: JobContext) -> DistillDryRun:
        return dry_run(context)

    def show(self, result: DistillResult) -> list[RenderableType]:
        return result_tables(result)


STAGE = DistillStage()
