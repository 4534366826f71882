"""Quantization-aware distillation: train the student's float32 master weights so that their low-bit version copies
the teacher.

The forward pass computes with `decode(encode(weight))`, int8 activations and int8 keys and values, as the packed model
will: codes and scales are exactly those that are packed, products are in `precision` (float32 as packed, or bfloat16
between the layers and float32 for logits), and held-out text is measured in the same. The gradient passes straight
through the rounding; nothing is dropped out, whatever the checkpoint's configuration says of its pre-training. The
objective is a weighted sum of losses from `edgerazor/losses`, by default EdgeRazor's CE + EAKLD + LAFD (arXiv
2605.04062).

An optimizer step is `accumulation` micro-batches on each process. Counts and teacher statistics of the whole step are
known before the student's first backward pass, so that 2B sequences on one process, B on two, and 2 micro-batches of
B give the same gradient. The order of the data is a function of the step, so the step is the position in the data.

A training may have phases (scales alone first, then everything), each with a part of the budget, an optimizer and a
schedule of its own; the data go on from phase to phase.

The state of a training is its checkpoint. The two students beside it are what `pack` reads: `last`, and `best`, the one
with the lowest held-out loss so far. A killed training goes on from the checkpoint and makes the same numbers again.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import BaseModel
from rich.console import RenderableType
from safetensors.torch import save_file
from torch import Tensor

from edgerazor import calibrated, data, devices, losses, models, modules, untrusted
from edgerazor.allocate import Plan
from edgerazor.calibration import initialization
from edgerazor.console import Console, table
from edgerazor.errors import INTERRUPTED, UserError, usage_error
from edgerazor.job import JobContext, LoadedModel
from edgerazor.losses import Head, Outputs, StepTotals, step_counts
from edgerazor.models import PreTrainedModel
from edgerazor.recipe import Distill, Recipe
from edgerazor.stage import Stage
from edgerazor.student import CALIBRATED_INITS
from edgerazor.training import checkpoint, objective, phase_schedule, reconstruction
from edgerazor.training.objective import Captures, Teacher, Terms
from edgerazor.training.optimizer import make_optimizer, schedule, set_rate
from edgerazor.training.phase_schedule import PhaseEstimate, PhaseResult
from edgerazor.workdir import WorkDir, make_folder, replace_folder, write_atomically, write_json, write_text

NAME = "distill"
#: Steps where no budget is given; fewer of them where the data would be read more often than so many times.
DEFAULT_STEPS, DEFAULT_PASSES = 1000, 16
#: Passes over the data up to which they are about as good as new data (Muennighoff et al., arXiv 2305.16264).
GOOD_PASSES = 4
STUDENT_FILES = ("model.safetensors", "digests.json", "measured.json")

Batch = dict[str, Tensor]


class DistillResult(BaseModel):
    """What distill reached. `stopped` says by what: the budget was used up, or the target of quality reached."""

    notation: str
    steps: int
    tokens: int
    seconds: float
    loss: float
    best: float
    best_step: int
    measure: str
    tokens_per_second: float
    block_errors: list[tuple[float, float]] = []
    phases: list[PhaseResult] = []
    stopped: Literal["budget", "target"] = "budget"


class DistillDryRun(BaseModel):
    """What distill would do."""

    notation: str
    steps: int | None
    tokens_per_step: int
    memory_bytes: int
    disk_bytes: int
    result_bytes: int
    seconds_per_step: float
    seconds: float | None
    phases: dict[str, PhaseEstimate] = {}


def inputs(context: JobContext) -> dict[str, str]:
    """Everything the result depends on.

    `max_time` and how often to save do not change what is trained, and how the sequences of a step are divided among
    processes and micro-batches changes it only in the last digits.
    """
    recipe, calibrated = context.recipe, context.work.manifest("calibrate")
    settings = recipe.distill
    skip = ("max_time", "checkpoint_every", "gradient_checkpointing", "batch_size", "accumulation", "phases")
    alone = () if settings.teachers else ("teacher_average",)
    section = context.section_inputs("distill", skip + alone)
    bits = context.nominal_bits(context.plan() if calibrated else None)
    section |= {"distill.phases": phase_schedule.in_words(settings, bits)} if settings.phases else {}
    section["distill.losses"] = objective.in_words(settings.losses, bits)
    section["distill.teachers"] = context.further_teachers_fingerprint
    budget, limit = recipe.calibrate.budget()
    return {
        budget: str(limit),
        "model": context.teacher_fingerprint,
        "data": context.data_fingerprint,
        "held_out": context.held_out_fingerprint,
        "data.sequence_length": str(recipe.data.sequence_length),
        "data.packing": recipe.data.packing,
        **context.text_inputs,
        "seed": str(recipe.seed),
        "sequences per step": str(settings.batch_size * settings.accumulation * devices.process_count()),
        **section,
        "calibrate": calibrated.fingerprint() if calibrated else "missing",
    }


@dataclass
class Job:
    """Everything the training loop uses."""

    settings: Distill
    accelerator: Accelerator
    teachers: list[Teacher]  # the model itself and further ones; none where nothing needs one
    student: PreTrainedModel
    trained: Any  # the student, wrapped by accelerate when there are several processes
    optimizer: torch.optim.Optimizer
    structure: models.Structure
    plan: Plan
    rows: data.TokenRows
    held_out: data.TokenRows
    length: int
    phases: list[phase_schedule.Training]
    terms: Terms  # of the current phase
    logit_shape: tuple[float, float | None]
    tokens_per_row: float
    packed_bytes: int  # of what pack will write
    compared: set[int] = field(default_factory=set)  # layers whose hidden states the last step compared
    progress: checkpoint.Progress = field(default_factory=checkpoint.Progress)
    began: float = 0.0

    @property
    def looks(self) -> Captures:
        """What losses need of the student ..."""
        return objective.looks(loss for _, loss in self.terms)

    @property
    def teacher_looks(self) -> Captures:
        """... and those that compare need of the first teacher."""
        return objective.looks(loss for _, loss in self.terms if loss.needs_teacher)

    @property
    def comparing(self) -> bool:
        """Whether a loss needs the teachers."""
        return any(loss.needs_teacher for _, loss in self.terms)

    @property
    def phase(self) -> phase_schedule.Training:
        """The current one; the first before it has begun."""
        return self.phases[max(self.progress.phase, 1) - 1]

    @property
    def rows_per_step(self) -> int:
        return self.settings.batch_size * self.settings.accumulation * self.accelerator.num_processes

    @property
    def tokens_per_step(self) -> int:
        """On average, where rows are of different lengths."""
        return round(self.rows_per_step * self.tokens_per_row)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the budget; None when only the clock limits them."""
        limits = [self.settings.steps] if self.settings.steps else []
        if self.settings.tokens:
            limits.append(math.ceil(self.settings.tokens / self.tokens_per_step))
        if not limits and not self.settings.max_time:
            limits.append(self.default_steps())
        return min(limits) if limits else None

    def default_steps(self) -> int:
        """Without a budget: 1000, but no more than read the smallest source 16 times."""
        passes = self.rows.passes(DEFAULT_STEPS * self.rows_per_step)
        return DEFAULT_STEPS if passes <= DEFAULT_PASSES else max(1, int(DEFAULT_STEPS * DEFAULT_PASSES / passes))

    def seconds(self) -> float:
        """Training time so far, resumes included."""
        return self.progress.seconds + time.monotonic() - self.began

    def share(self) -> float:
        """How much of the budget is used, 0 to 1, all phases together."""
        shares = [self.progress.step / self.steps] if self.steps else []
        if self.settings.max_time:
            before = self.progress.block_seconds  # the schedule begins when all layers are trained together
            shares.append((self.seconds() - before) / max(self.settings.max_time - before, 1e-9))
        return min(1.0, max(shares))


def run(context: JobContext) -> DistillResult:
    """Train, from the last checkpoint if there is one, and write the `best` and `last` students.

    Args:
        context: of the whole job; `fresh` throws away what an earlier training left, once this one can start.

    Raises:
        UserError: the recipe cannot work with this model or text, the training diverges, or it was interrupted.
    """
    recipe, work, console = context.recipe, context.work, context.console
    job = prepare(context)
    identity = inputs(context)
    if job.accelerator.is_main_process:
        begin(work, console, context.fresh)
    job.accelerator.wait_for_everyone()
    objective.say_who_teaches(recipe, job.terms, job.teachers, console)
    say_passes(job, console)
    resume(job, work, console)
    with watch_signals() as signals:
        look(job, work, identity, "initialise", 0)
        reconstruct_blocks(job, work, identity, signals, console)
        if (blocks := job.settings.reconstruct) is not None:
            look(job, work, identity, "reconstruct", blocks.steps * job.structure.layer_count)
        train(job, work, identity, signals, console)
    job.accelerator.wait_for_everyone()
    return finish(job, work)


def say_passes(job: Job, console: Console) -> None:
    """How often the training reads its data; a warning where that is more than a few times."""
    if not (job.steps and len(job.rows)):  # limited by the clock alone, or a stream
        return
    passes = job.rows.passes(job.steps * job.rows_per_step)
    said = f"{job.steps:,} steps read the {len(job.rows):,} sequences of the data {passes:.1f} times"
    if passes > GOOD_PASSES:
        console.warn(f"{said}; more text (--data FILE) would teach more than repeating it over {GOOD_PASSES} times.")
    elif passes > 1:
        console.say(f"{said}.")


def train(job: Job, work: WorkDir, identity: dict[str, str], signals: Signals, console: Console) -> None:
    """All steps that are left.

    Raises:
        UserError: as `run`.
    """
    if job.progress.phase == 0:
        begin_phases(job, 1, 0.0)
    with console.track("distill", job.steps or 0, job.progress.step) as tracker:
        for batches in step_batches(job):
            loss = train_step(job, batches)
            count_step(job, loss)
            finished, interrupted = over(job, False), bool(agree(job, float(signals.received)))
            finished, ended = keep(job, work, identity, finished, interrupted)
            tracker.note(in_words(job))
            tracker.advance()
            if ended:
                console.say(phase_in_words(job))
            if finished:
                break
            if interrupted:
                raise interruption(job)


def reconstruct_blocks(job: Job, work: WorkDir, identity: dict[str, str], signals: Signals, console: Console) -> None:
    """Train the layers that are not reconstructed yet, one by one, if the recipe wants it; each is kept.

    Raises:
        UserError: it was interrupted.
    """
    count, done = job.structure.layer_count, len(job.progress.block_errors)
    if job.settings.reconstruct is None or done == count or job.progress.on_target:
        return
    found = reconstruction.reconstruct(
        job.student,
        job.teachers[0].model,
        job.structure,
        job.rows,
        job.settings,
        job.accelerator,
        done,
        lambda: bool(agree(job, float(signals.received))),
    )
    with console.track("reconstruct layers", count, done) as tracker:
        for errors in found:
            if errors is None:
                raise UserError(
                    f"Interrupted while layer {len(job.progress.block_errors) + 1} of {count} was reconstructed; those "
                    "before it are saved.",
                    "The same command goes on from there.",
                    INTERRUPTED,
                )
            job.progress.block_errors.append(errors)
            job.progress.block_seconds = job.seconds()
            if job.accelerator.is_main_process:
                save_progress(job, work, identity)
            tracker.note(f"relative error {errors[0]:.4f}, then {errors[1]:.4f}")
            tracker.advance()


def count_step(job: Job, loss: float) -> None:
    job.progress.step += 1
    job.progress.tokens += job.tokens_per_step
    job.progress.loss = loss


def in_words(job: Job) -> str:
    """Where the training is, in a few words."""
    best = f", best held-out {measured_by(job)} {job.progress.best:.4f}" if job.progress.best is not None else ""
    return f"loss {job.progress.loss:.4f}{best}"


def phase_in_words(job: Job) -> str:
    """What the phase that ended last has reached."""
    ended = job.progress.phases[-1]
    what = f"phase {ended.phase} of {len(job.phases)} ({ended.what})"
    return f"{what}: {ended.steps} steps, held-out {measured_by(job)} {ended.held_out:.4f}"


def interruption(job: Job) -> UserError:
    return UserError(
        f"Interrupted at step {job.progress.step}; everything is saved.",
        "The same command goes on from there.",
        INTERRUPTED,
    )


# --- phases -------------------------------------------------------------------------------------


def begin_phases(job: Job, number: int, share: float) -> None:
    """Go on with a phase, counted from 1, when a share of the whole budget is used."""
    progress = job.progress
    progress.phase, progress.phase_step, progress.phase_share = number, progress.step, share
    if number == 1:
        progress.block_seconds = job.seconds()
    enter_phase(job, number)


def enter_phase(job: Job, number: int) -> None:
    """Train what a phase trains from now on, with a new optimizer; `prepare` does so for a training without phases."""
    if not job.settings.phases:
        return
    phase = job.phases[number - 1]
    job.settings, job.terms = phase.settings, phase.terms
    if phase.settings.train == "scales":
        modules.freeze_codes(job.student)
    else:
        modules.unfreeze_codes(job.student)
    # what was wrapped knows the parameters that were trained when it was made
    job.accelerator.unwrap_model(job.trained, keep_fp32_wrapper=False)
    job.accelerator.free_memory()
    job.trained = job.accelerator.prepare_model(job.student)
    job.optimizer = make_optimizer(job.student, phase.settings)


def end_phase(job: Job, held_out: float, finished: bool) -> None:
    """Report the current phase and go on with the next that has a part of the budget left, unless that was the end."""
    share = agree(job, job.share())
    report(job, job.progress.phase, job.settings.train, job.progress.step - job.progress.phase_step, held_out)
    while not finished:
        begin_phases(job, job.progress.phase + 1, share)
        if not job.phase.over(share) or job.progress.phase == len(job.phases):
            return
        report(job, job.progress.phase, job.settings.train, 0, held_out)  # a step has used up its time too


def report(job: Job, phase: int, what: str, steps: int, held_out: float) -> None:
    """Note what a phase has reached, in the place of what it had reached when it ended before."""
    progress, now = job.progress, job.seconds()
    kept = [each for each in progress.phases if each.phase < max(phase, 1)]
    seconds = round(now - progress.phase_seconds, 1)
    progress.phases = [*kept, PhaseResult(phase=phase, what=what, steps=steps, seconds=seconds, held_out=held_out)]
    progress.phase_seconds = now


def look(job: Job, work: WorkDir, identity: dict[str, str], what: str, steps: int) -> None:
    """Before the first step of a training with phases or a target: measure, report and save, once."""
    progress = job.progress
    asked = job.settings.phases or job.settings.target_kl is not None
    if not asked or progress.phase or progress.on_target or any(each.what == what for each in progress.phases):
        return
    held_out = measure(job, work, what)
    report(job, 0, what, steps, held_out)
    progress.on_target = good_enough(job, held_out)
    if job.accelerator.is_main_process:
        save_progress(job, work, identity)


def good_enough(job: Job, held_out: float | None) -> bool:
    """Whether what was just measured reaches the target, if there is one."""
    target = job.settings.target_kl
    return target is not None and held_out is not None and held_out <= target


# --- where it starts ---------------------------------------------------------------------------


def begin(work: WorkDir, console: Console, fresh: bool) -> None:
    """Clear the stage's folder, unless there is a checkpoint to go on from and the students that belong to it."""
    found = checkpoint.stored_progress(work.checkpoint("current")) if not fresh else None
    if found and found.best is not None and not all(has_student(work.student(name)) for name in ("best", "last")):
        console.say("distill starts again, because a student that it made is missing")
        found = None
    if found is None:
        work.discard(NAME)
    work.manifest_file(NAME).unlink(missing_ok=True)
    make_folder(work.folder(NAME))


def has_student(folder: Path) -> bool:
    return all((folder / name).exists() for name in STUDENT_FILES)


def resume(job: Job, work: WorkDir, console: Console) -> None:
    """Bring the job to where its checkpoint left it, if there is one."""
    stored = checkpoint.stored_progress(work.checkpoint("current"))
    if stored and stored.phase:
        enter_phase(job, stored.phase)
    found = checkpoint.restore(work.checkpoint("current"), job.student, job.optimizer)
    if found:
        job.progress = found
        if found.step:
            found.phase = max(found.phase, 1)  # checkpoints did not always say that the first had begun
        job.rows.restore(found.streams)
        adopt_best(job, work.student("best"))
        console.say(f"distill goes on from step {found.step}")
    if job.accelerator.is_main_process:
        trim_metrics(work.metrics_file, job.progress.metrics_lines)
    job.began = time.monotonic()


def adopt_best(job: Job, folder: Path) -> None:
    """The best student may have been saved after the checkpoint; it is still the one to beat."""
    if job.progress.best is None and not has_student(folder):
        return
    try:
        measured = untrusted.load_json(folder / "measured.json")
        job.progress.best, job.progress.best_step = float(measured["value"]), int(measured["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"The student {folder} is damaged, so the training cannot go on.",
            "Start again with `edgerazor distill --force`.",
        ) from None


# --- preparation -------------------------------------------------------------------------------


def prepare(context: JobContext, imagined: bool = False) -> Job:
    """Load the teacher, make the student, open the text. A recipe that cannot work is refused here, at the start.

    Args:
        context: of the whole job; its working directory holds calibrate's plan and statistics.
        imagined: for a dry run: make up what calibrate has not written yet.
    """
    recipe, device = context.recipe, context.device
    settings = recipe.distill
    half = uses_bfloat16(settings, device)
    check(recipe)
    devices.join_processes(device)
    AcceleratorState._reset_state()  # one process may train more than once, and not always in the same precision
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=device.type == "cpu")
    dtype = torch.bfloat16 if half else torch.float32
    loaded = context.load_teacher(accelerator.device, dtype)
    teacher, structure = loaded.model, loaded.structure
    logit_shape = models.logit_shape(teacher, structure.head_path)
    plan = context.new_plan(loaded) if imagined else context.plan()
    measured = objective.unmeasured(structure.layer_count) if imagined else calibrated.read_layer_metrics(context.work)
    phases = phase_schedule.trainings(recipe, structure.layer_count, measured, context.nominal_bits(plan))
    terms = [term for phase in phases for term in phase.terms]
    teaching = any(loss.needs_teacher for _, loss in terms) or settings.reconstruct or settings.target_kl
    first = Teacher(teacher, structure, structure.head_path, logit_shape)
    others = objective.load_others(recipe, accelerator.device, dtype)
    length = min(context.sequence_length(each) for each in (teacher, *(other.model for other in others)))
    rows, held_out = open_text(context, loaded, length, imagined)
    how = context.student_settings(plan, structure, imagined)
    input_scales = context.input_scales(plan, loaded, imagined)
    start = None if imagined else initialization.stored(context, plan)
    student = make_student(recipe, structure, plan, how, input_scales, accelerator.device, start)
    objective.open_models(student, teacher, structure, terms)
    job = Job(
        settings=settings,
        accelerator=accelerator,
        teachers=[first, *others] if teaching else [],
        student=student,
        trained=accelerator.prepare_model(student),
        optimizer=make_optimizer(student, settings),
        structure=structure,
        plan=plan,
        rows=rows,
        held_out=held_out,
        length=length,
        phases=phases,
        terms=phases[0].terms,
        logit_shape=logit_shape,
        tokens_per_row=rows.tokens_per_row,
        packed_bytes=context.packed_size(loaded, measured=not imagined)(plan).bytes,
    )
    phase_schedule.check_steps(phases, job.steps)
    return job


def uses_bfloat16(settings: Distill, device: torch.device) -> bool:
    return settings.precision == "bfloat16" or (settings.precision == "auto" and devices.fast_bfloat16(device))


def open_text(
    context: JobContext, teacher: LoadedModel, length: int, imagined: bool
) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows to train on and rows to measure on; made up for a dry run where there is no text yet."""
    if imagined and not (context.recipe.data.train or context.work.generated_text.exists()):
        return imagined_text(length, context.recipe.data.generated_tokens)
    # `eval` will know by the teacher's own length what was held out.
    return context.open_text(teacher.tokenizer, length, context.sequence_length(teacher.model))


def imagined_text(length: int, tokens: int) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows of some small token ids, as many as the teacher would write, for a dry run without text."""
    rows = data.TokenRows([np.arange(max(length, tokens), dtype=np.int32) % 16], [1.0], length)
    return rows, rows


def check(recipe: Recipe) -> None:
    """Refuse losses, layers and starts that cannot be, before anything that takes time.

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


def make_student(
    recipe: Recipe,
    structure: models.Structure,
    plan: Plan,
    settings: modules.Settings,
    input_scales: dict[str, float] | None,
    device: torch.device,
    start: Callable[[str], modules.Start] | None = None,
) -> PreTrainedModel:
    """A float32 copy of the teacher, or a random one for the control, with training modules in it.

    `start` says where its matrices begin, if not at the scales that the plan says.
    """
    if recipe.distill.initialise == "teacher":
        student, _ = models.load(recipe.model, recipe.revision, "cpu", torch.float32, recipe.trust_remote_code)
    else:
        student = models.initialise(recipe.model, recipe.revision, recipe.seed, recipe.trust_remote_code)
    if recipe.distill.gradient_checkpointing:
        models.checkpoint_activations(student)
    scales_only = recipe.distill.train == "scales"
    modules.prepare_for_training(student, structure, plan.specs(), settings, scales_only, input_scales, start)
    student.config.use_cache = False
    return student.to(device).train()


# --- one step ----------------------------------------------------------------------------------


def step_batches(job: Job) -> Iterator[list[Batch]]:
    """The micro-batches of this process for every step, from the current one on."""
    accelerator, settings = job.accelerator, job.settings
    while not (over(job, True) or job.progress.on_target):
        yield [
            job.rows.batch(
                step=job.progress.step,
                micro=micro,
                accumulation=settings.accumulation,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                batch_size=settings.batch_size,
            )
            for micro in range(settings.accumulation)
        ]


def train_step(job: Job, batches: list[Batch]) -> float:
    """One optimizer step; returns its loss."""
    accelerator = job.accelerator
    batches = [{key: value.to(accelerator.device) for key, value in batch.items()} for batch in batches]
    targets, totals = taught(job, batches)
    share = job.phase.share(agree(job, job.share()), job.progress.phase_share)
    rate = job.settings.learning_rate * schedule(job.settings, share)
    terms = [(term.weight_at(share), loss) for term, loss in job.terms]
    set_rate(job.optimizer, rate)
    total = torch.zeros((), device=accelerator.device)
    for index, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(job.trained):
            student = student_outputs(job, batch, job.trained, job.looks)
            loss = losses.objective(terms, student, target, batch["labels"], totals)
            # Processes' gradients are averaged, but contributions add up.
            accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
    norm = accelerator.clip_grad_norm_(job.student.parameters(), job.settings.clip)
    if not torch.isfinite(norm):
        raise UserError(
            f"The gradient is not finite at step {job.progress.step + 1}.",
            "Lower --learning-rate, or train with `precision: float32` in the recipe.",
        )
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return float(accelerator.reduce(total, "sum"))


def taught(job: Job, batches: list[Batch]) -> tuple[list[Outputs | None], StepTotals]:
    """What the teachers say of each micro-batch of a step, and the step's totals.

    Which layers are compared may depend on all micro-batches, and the hidden states of all layers of all of them may be
    more than fits in memory. So those are kept that the last step compared, which are nearly always the same; where
    they are not, the teacher reads the micro-batch again.
    """
    kept = objective.sure_layers(job.terms) | job.compared
    targets, found = [], []
    for batch in batches:
        target = teacher_outputs(job, batch, job.teacher_looks) if job.comparing else None
        if target is not None:
            objective.keep_logits(target, batch["labels"], job.terms, len(batches))
        found.append(statistics(job, batch, target))
        if target is not None:
            objective.keep_layers(target, kept)
        targets.append(target)
    totals = step_totals(job, found)
    job.compared = objective.compared_layers(job.terms, totals)
    for batch, target in zip(batches, targets, strict=True):
        if target is None:
            continue
        objective.keep_layers(target, job.compared)
        if missing := sorted(job.compared - target.hidden.keys()):
            again = job.teachers[0].outputs(batch["input_ids"], Captures(hidden=tuple(missing)))
            target.hidden |= again.hidden
    return targets, totals


def teacher_outputs(job: Job, batch: Batch, looks: Captures) -> Outputs | None:
    """The teachers' final hidden states [B, T, H], their heads, and what losses look at in the first."""
    return objective.all_outputs(job.teachers, batch["input_ids"], looks, job.settings.teacher_average)


def student_outputs(job: Job, batch: Batch, model: torch.nn.Module, looks: Captures) -> Outputs:
    """The same of the student, with gradients; `model` is it or what accelerate wrapped it in."""
    watching = objective.watch(job.student, job.structure, job.structure.head_path, looks)
    with watching as seen, job.accelerator.autocast():
        model(input_ids=batch["input_ids"], use_cache=False)
        head = job.student.get_submodule(job.structure.head_path)
        assert isinstance(head, modules.FakeQuantLinear)
        states, matrix = head.as_head(seen.final[0])
    scale, cap = job.logit_shape
    return Outputs(states, seen.hidden, Head(scale=scale, cap=cap, **matrix), seen.attention)


def statistics(job: Job, batch: Batch, target: Outputs | None) -> dict[str, Tensor]:
    """Counts and teacher statistics of a micro-batch, to add up: name -> []."""
    samples, tokens = step_counts(batch["labels"])
    device = job.accelerator.device
    found = {
        "samples": torch.tensor(samples, dtype=torch.float64, device=device),
        "tokens": torch.tensor(tokens, dtype=torch.float64, device=device),
    }
    for _, loss in job.terms:
        if target is not None:
            found |= loss.teacher_statistics(target, batch["labels"])
    return found


def step_totals(job: Job, found: list[dict[str, Tensor]]) -> StepTotals:
    """The sums of the statistics of a step's micro-batches, over all processes."""
    sums: dict[str, Tensor] = {}
    device = job.accelerator.device
    for each in found:
        for name, value in each.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + value.double()
    sums = {name: job.accelerator.reduce(value, "sum") for name, value in sums.items()}
    samples, tokens = int(sums.pop("samples")), int(sums.pop("tokens"))
    return StepTotals(samples, tokens, {name: float(value) / max(samples, 1) for name, value in sums.items()})


def over(job: Job, before: bool) -> bool:
    """Whether the budget is used up, as the main process sees it; `before` a step, only counters are looked at."""
    if job.steps is not None and job.progress.step >= job.steps:
        return True
    if before or not job.settings.max_time:
        return False
    return bool(agree(job, float(job.seconds() >= job.settings.max_time)))


def agree(job: Job, value: float) -> float:
    """The largest of the processes' values, so that all of them decide alike."""
    if job.accelerator.num_processes == 1:
        return value
    return float(job.accelerator.gather(torch.tensor([value], device=job.accelerator.device)).max())


# --- measuring and saving ----------------------------------------------------------------------


def keep(job: Job, work: WorkDir, identity: dict[str, str], finished: bool, interrupted: bool) -> tuple[bool, bool]:
    """After a step: measure and save what is due.

    Returns:
        whether that was the last step, because the budget is used up or the target reached; whether a phase has ended.
    """
    settings, step = job.settings, job.progress.step
    ended = finished or (len(job.phases) > 1 and job.phase.over(agree(job, job.share())))
    if ended or step % settings.evaluate_every == 0:
        held_out = measure(job, work, settings.train)
        job.progress.on_target = good_enough(job, held_out)
        finished = finished or job.progress.on_target
        ended = bool(settings.phases) and (ended or finished)
        if ended:
            end_phase(job, held_out, finished)
    saving = ended or finished or interrupted or step % settings.checkpoint_every == 0
    if saving and job.accelerator.is_main_process:
        save_progress(job, work, identity)
    return finished, ended


def measure(job: Job, work: WorkDir, what: str) -> float:
    """Held-out loss of the student as it would be packed, measured by the main process for all; keep the best.

    Args:
        job: in training.
        work: where students go.
        what: was done to the student, for the metrics of a training with phases.
    """
    if not job.accelerator.is_main_process:
        return agree(job, -math.inf)
    found, digests = held_out_losses(job)
    value = found[measured_by(job)]
    if not math.isfinite(value):
        raise UserError(f"The held-out loss is not finite at step {job.progress.step}.", "Lower --learning-rate.")
    if job.progress.best is None or value < job.progress.best:
        job.progress.best, job.progress.best_step = value, job.progress.step
        save_student(job, work.student("best"), digests, value)
    save_student(job, work.student("last"), digests, value)
    line: dict[str, Any] = {"phase": job.progress.phase, "what": what} if job.settings.phases else {}
    line |= {"step": job.progress.step, "tokens": job.progress.tokens, "seconds": round(job.seconds(), 1)}
    append_metrics(work.metrics_file, {**line, "loss": job.progress.loss, **found})
    job.progress.metrics_lines += 1
    return agree(job, value)


@torch.no_grad()
def held_out_losses(job: Job) -> tuple[dict[str, float], dict[str, str]]:
    """In nats per token: `cross_entropy` and, where there is a teacher, `kl`; and the digests of the codes used."""
    job.student.eval()
    sums = {"cross_entropy": 0.0, "kl": 0.0, "tokens": 0.0}
    with modules.frozen_codes(job.student) as digests:
        for batch in data.sample_batches(job.held_out, job.settings.evaluate_sequences, job.settings.batch_size):
            for name, value in held_out_sums(job, batch).items():
                sums[name] += value
    job.student.train()
    tokens = sums["tokens"]
    found = {"cross_entropy": sums["cross_entropy"] / tokens}
    if job.teachers:
        found["kl"] = sums["kl"] / tokens
    return found, digests


def measured_by(job: Job) -> str:
    """What decides which student is the best."""
    return "kl" if job.teachers else "cross_entropy"


def held_out_sums(job: Job, batch: Batch) -> dict[str, float]:
    """Sums over the predicted tokens of a batch, in nats: cross entropy, KL(teacher || student); and their count."""
    batch = {key: value.to(job.accelerator.device) for key, value in batch.items()}
    student, teacher = student_outputs(job, batch, job.student, Captures()), teacher_outputs(job, batch, Captures())
    names = ("cross_entropy", "kl") if teacher is not None else ("cross_entropy",)
    sums = {name: torch.zeros((), dtype=torch.float64, device=student.states.device) for name in names}
    for chunk in losses.chunks(student, teacher, batch["labels"], StepTotals(1, 1)):
        for _, rows in chunk.blocks():
            sums["cross_entropy"] -= rows.log_student().gather(1, rows.targets[:, None]).sum()
            if teacher is not None:
                ours, theirs = rows.log_both()
                sums["kl"] += (theirs.exp() * (theirs - ours)).sum()
    _, tokens = step_counts(batch["labels"])
    return {"tokens": float(tokens)} | {name: float(value) for name, value in sums.items()}


def save_student(job: Job, folder: Path, digests: dict[str, str], value: float) -> None:
    """What was trained, and the digests of the codes that were just used.

    Master weights are float32 under the teacher's own names, trained scales lie beside them (`P.scales` of `P.weight`);
    where only scales were trained, `P.weight` is the codes, int8.
    """
    measured = {"step": job.progress.step, "measure": f"held-out {measured_by(job)}", "value": value}
    seen: set[int] = set()
    tensors = {}
    for name, tensor in job.student.state_dict(keep_vars=True).items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().contiguous().cpu()
    with replace_folder(folder) as new:
        write_atomically(new / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        (new / "digests.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")
        (new / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def save_progress(job: Job, work: WorkDir, identity: dict[str, str]) -> None:
    """Write the checkpoint; the clock goes on from here."""
    job.progress.seconds, job.began = job.seconds(), time.monotonic()
    job.progress.streams = job.rows.state(job.progress.step, job.rows_per_step)
    checkpoint.save(work.checkpoint("current"), job.student, job.optimizer, job.progress, identity)


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def trim_metrics(path: Path, lines: int) -> None:
    """Drop what was measured after the checkpoint that we go on from."""
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if path.exists() else []
    write_text(path, "".join(kept))


def finish(job: Job, work: WorkDir) -> DistillResult:
    progress = job.progress
    result = DistillResult(
        notation=job.plan.notation(),
        steps=progress.step,
        tokens=progress.tokens,
        seconds=round(progress.seconds, 1),
        loss=progress.loss or 0.0,
        best=progress.best or 0.0,
        best_step=progress.best_step,
        measure=f"held-out {measured_by(job)}, nats per token",
        tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 1),
        block_errors=[(float(f"{before:.4g}"), float(f"{after:.4g}")) for before, after in progress.block_errors],
        phases=progress.phases,
        stopped="target" if progress.on_target else "budget",
    )
    if job.accelerator.is_main_process:
        write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


class Signals:
    received = False


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Note Ctrl-C and termination instead of dying in the middle of a step; asked again later, die at once.

    A launcher passes a Ctrl-C on to processes that have had it already, so what follows within a second is the same.
    """
    seen = Signals()
    first = 0.0

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        if not seen.received:
            seen.received, first = True, time.monotonic()
        elif time.monotonic() - first > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield seen
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dry_run(context: JobContext) -> DistillDryRun:
    """What would be trained, and how long it would take, from one measured step of each phase that is thrown away."""
    job = prepare(context, imagined=True)
    measured = [measured_step(job, number) for number in range(1, len(job.phases) + 1)]
    weights, moments = (max(sizes) for sizes in zip(*(each[1:] for each in measured), strict=True))
    gradients = moments // 2
    teacher = sum(p.numel() * p.element_size() for each in job.teachers for p in each.model.parameters())
    sizes = job.student.config.get_text_config()
    logits = job.settings.batch_size * job.length * sizes.vocab_size * 4
    blocks = job.settings.reconstruct
    kept = 2 * blocks.sequences * job.length * sizes.hidden_size * 4 if blocks else 0
    phases = estimates(job, [each[0] for each in measured])
    seconds = [each.seconds for each in phases.values() if each.seconds is not None] if job.steps else []
    return DistillDryRun(
        notation=job.plan.notation(),
        steps=job.steps,
        tokens_per_step=job.tokens_per_step,
        memory_bytes=weights + gradients + moments + teacher + 4 * logits + kept,
        disk_bytes=2 * (weights + moments) + 3 * weights,  # checkpoint, the next one, best, last, one being written
        result_bytes=job.packed_bytes,
        seconds_per_step=float(f"{measured[-1][0]:.3g}"),
        seconds=float(f"{sum(seconds):.3g}") if job.steps else job.settings.max_time,
        phases=phases if job.settings.phases else {},
    )


def measured_step(job: Job, number: int) -> tuple[float, int, int]:
    """Seconds of a step of a phase, bytes of the student's weights in it, and of the optimizer's moments."""
    enter_phase(job, number)
    batches = next(step_batches(job))
    train_step(job, batches)  # the first one pays for what later ones find ready
    began = time.monotonic()
    train_step(job, batches)
    seconds = time.monotonic() - began
    masters = [each.master.weight for each in modules.fake_quant_weights(job.student).values() if each.master]
    weights = sum(p.numel() * p.element_size() for p in (*job.student.parameters(), *masters))
    return seconds, weights, sum(8 * p.numel() for p in job.student.parameters() if p.requires_grad)


def estimates(job: Job, seconds: list[float]) -> dict[str, PhaseEstimate]:
    """Steps and seconds of reconstruction and every phase, from the seconds of a step of each."""
    found, blocks, before = {}, job.settings.reconstruct, 0.0
    if blocks:
        # a step of every layer is about one of the whole, of all that is trained
        before = blocks.steps * max(seconds)
        found["reconstruct"] = PhaseEstimate(
            steps=blocks.steps * job.structure.layer_count, seconds=float(f"{before:.3g}")
        )
    taken: list[int] | list[None] = (
        phase_schedule.steps_of(job.phases, job.steps) if job.steps else [None] * len(job.phases)
    )
    left, begin = max((job.settings.max_time or 0.0) - before, 0.0), 0.0
    for number, (phase, steps, each) in enumerate(zip(job.phases, taken, seconds, strict=True), 1):
        taking = left * (phase.end - begin) if steps is None else steps * each
        found[f"{number} {phase.settings.train}"] = PhaseEstimate(steps=steps, seconds=float(f"{taking:.3g}"))
        begin = phase.end
    return found


def show(result: DistillResult) -> list[RenderableType]:
    """The training, for people."""
    errors = [f"{before:.3f} to {after:.3f}" for before, after in result.block_errors]
    shown = [
        table(
            f"Student {result.notation}" + (", target reached" if result.stopped == "target" else ""),
            ["steps", "tokens", "seconds", "tokens/s", "loss", result.measure, "at step"],
            [
                [
                    str(result.steps),
                    f"{result.tokens:,}",
                    f"{result.seconds:.0f}",
                    f"{result.tokens_per_second:,.0f}",
                    f"{result.loss:.4f}",
                    f"{result.best:.4f}",
                    str(result.best_step),
                ]
            ],
            caption=f"Layers were reconstructed first, relative error from {', '.join(errors)}" if errors else "",
        )
    ]
    if result.phases:
        names = [f"{each.phase} {each.what}" if each.phase else each.what for each in result.phases]
        rows = [
            [name, str(each.steps), f"{each.seconds:.0f}", f"{each.held_out:.4f}"]
            for name, each in zip(names, result.phases, strict=True)
        ]
        shown.insert(0, table("Phases", ["phase", "steps", "seconds", f"{result.measure}, at its end"], rows))
    return list(shown)


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
        return show(result)


STAGE = DistillStage()
