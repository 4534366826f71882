"""A training that can start: teacher, student, text and phases of a recipe, opened and checked against one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from edgerazor import calibrated, data, devices, models
from edgerazor.allocate import Plan
from edgerazor.job import JobContext, ModelOutline
from edgerazor.models import PreTrainedModel
from edgerazor.recipe import Distill, Recipe
from edgerazor.training import objective, phase_schedule, sharding, tracking, zero3
from edgerazor.training.phase_schedule import ScheduledPhase, make_phases
from edgerazor.training.recorded_teacher import RecordedTeacher, check_losses, check_sequences
from edgerazor.training.served_teacher import check_served_losses
from edgerazor.training.speed import training_dtype
from edgerazor.training.store import TrainingStore
from edgerazor.training.student import Student, make_student
from edgerazor.training.teacher_sources import PreparedTeacher, open_teacher
from edgerazor.training.teachers import TeacherEnsemble
from edgerazor.training.trainer import Trainer
from edgerazor.workdir import WorkDir

if TYPE_CHECKING:
    from accelerate import Accelerator


class Preparation(NamedTuple):
    """A training that can start.

    Attributes:
        trainer: before its first step.
        plan: the format of every matrix of its student.
    """

    trainer: Trainer
    plan: Plan


def prepare(context: JobContext, inputs: dict[str, str]) -> Preparation:
    """Load the teacher, make the student, open the text. A recipe that cannot work is refused here, at the start.

    Args:
        context: of the whole job; its working directory holds calibrate's plan and statistics.
        inputs: everything that the result depends on, for the checkpoint.

    Raises:
        UserError: the recipe cannot work with this model or text.
    """
    recipe, device = context.recipe, context.device
    settings = recipe.distill
    dtype = training_dtype(settings, device)
    devices.join_processes(device)
    accelerator = make_accelerator(device, dtype, tracking.destination(settings, context.work.folder("distill")))
    sharded, by_deepspeed = sharding.is_wanted(), zero3.is_wanted()
    if sharded or by_deepspeed:
        sharding.check(settings)
    is_resident = settings.recording is None and not settings.is_served and settings.teacher_source == "resident"
    # what will be sharded moves to the device layer by layer
    teacher_device = torch.device("cpu") if sharded and is_resident else accelerator.device
    teacher = open_teacher(context, teacher_device, dtype)
    structure = teacher.outline.structure
    rows, held_out = open_text(context, teacher)
    plan = context.plan()
    phases = scheduled_phases(context, plan, structure.layer_count)
    student = load_student(recipe)
    logit_shape = models.logit_shape(teacher.outline.model if teacher.is_loaded else student, structure.head_path)
    student = prepare_student(context, student, teacher.outline, plan)
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
        student=Student(student, structure, logit_shape, accelerator, sharded, by_deepspeed),
        teachers=teacher.source if needs_teacher(settings, phases) else TeacherEnsemble(()),
        rows=rows,
        held_out=held_out,
        phases=phases,
        store=training_store(context.work, inputs),
    )
    phase_schedule.check_steps(phases, trainer.budget.steps)
    if isinstance(trainer.teachers, RecordedTeacher):
        recorded, steps = trainer.teachers.recording, trainer.budget.steps
        check_losses(terms, recorded.description, recorded.folder, layers_known=True)
        needed = None if steps is None else steps * trainer.rows_per_step
        check_sequences(recorded, rows, held_out, needed, settings.evaluate_sequences)
    return Preparation(trainer, plan)


def scheduled_phases(context: JobContext, plan: Plan, layer_count: int) -> list[ScheduledPhase]:
    """The phases of the training, with the layers that losses choose by what calibrate measured of each."""
    recipe, layer_metrics = context.recipe, calibrated.read_layer_metrics(context.work)
    return make_phases(recipe.distill, recipe.model, layer_count, layer_metrics, context.nominal_bits(plan))


def prepare_student(
    context: JobContext, student: PreTrainedModel, teacher: ModelOutline, plan: Plan
) -> PreTrainedModel:
    """The student on the CPU, its matrices fake-quantized as the plan says, from where calibrate lets them begin."""
    structure = teacher.structure
    computing = context.student_settings(plan, structure)
    input_scales = context.input_scales(plan, teacher)
    initial = context.initial_weights(plan)
    made = make_student(student, structure, plan, computing, context.recipe.distill, input_scales, initial)
    return models.let_see(made, tower=context.recipe.calibrate.towers or "")


def make_accelerator(device: torch.device, dtype: torch.dtype, trackers: dict[str, Any]) -> Accelerator:
    """What knows the device, the precision of products, trackers, and the other processes of a launcher."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one process may train more than once, and not always in the same precision
    with devices.hidden_from_accelerate():
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        return Accelerator(mixed_precision=precision, cpu=device.type == "cpu", **trackers)


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


def open_text(context: JobContext, teacher: PreparedTeacher) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows to train on and held-out rows, no longer than any teacher has positions for."""
    # `eval` will know what was held out by the length of the first teacher alone.
    held_out_length = context.sequence_length(teacher.outline.model)
    return context.open_text(teacher.tokenizer, teacher.length, held_out_length)


def training_store(work: WorkDir, training_inputs: dict[str, str]) -> TrainingStore:
    """Where the training's files lie in the working directory."""
    return TrainingStore(
        checkpoint=work.checkpoint("current"),
        best=work.student("best"),
        last=work.student("last"),
        metrics=work.metrics_file,
        inputs=training_inputs,
    )
