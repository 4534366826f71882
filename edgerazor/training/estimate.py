"""What a training would cost, without loading a weight: from shapes, the budget, and the speed of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgerazor import formats, modules
from edgerazor.allocate import Plan
from edgerazor.job import ModelOutline
from edgerazor.recipe import Distill
from edgerazor.training.budget import Budget
from edgerazor.training.memory import TrainedShape, step_memory
from edgerazor.training.phase_schedule import ScheduledPhase, steps_per_phase
from edgerazor.training.results import DistillDryRun, PhaseEstimate
from edgerazor.training.speed import PASSES, Speed, cost_of, step_seconds, weight_passes


@dataclass(frozen=True)
class PlannedTraining:
    """A training that could begin.

    Attributes:
        settings: the `distill` section.
        outline: of the teacher and the student.
        plan: formats of the student's matrices.
        phases: of the training, at least one.
        budget: its limits.
        length: tokens of a sequence.
        rows_per_step: sequences of a step, over all processes.
        processes: that train together.
        teacher_bytes: of the weights of all teachers, as they would be in memory.
        computing: how the student computes.
        dtype: of products.
        device: that would train.
    """

    settings: Distill
    outline: ModelOutline
    plan: Plan
    phases: Sequence[ScheduledPhase]
    budget: Budget
    length: int
    rows_per_step: int
    processes: int
    teacher_bytes: int
    computing: modules.Settings
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.length

    def scales(self) -> int:
        """Trained scales of weights; none where they are computed."""
        if self.plan.scales == "computed":
            return 0
        return sum(
            matrix.rows * formats.group_count(matrix.columns, matrix.group_size) for matrix in self.plan.matrices
        )


def estimate_training(training: PlannedTraining, speed: Speed, packed_bytes: int) -> DistillDryRun:
    """What a training would take.

    Args:
        training: what would be trained.
        speed: of training here, measured or estimated.
        packed_bytes: that `pack` would write.
    """
    settings, steps = training.settings, training.budget.steps
    weight_bytes, trained = student_sizes(training)
    seconds_of_steps = [phase_step_seconds(training, phase, speed) for phase in training.phases]
    phases = phase_estimates(training, seconds_of_steps)
    seconds = [phase.seconds for phase in phases.values() if phase.seconds is not None] if steps else []
    return DistillDryRun(
        notation=training.plan.notation(),
        steps=steps,
        tokens_per_step=training.tokens_per_step,
        memory_bytes=memory_bytes(training),
        # the checkpoint and the next one; the students best, last and the one being written
        disk_bytes=2 * (weight_bytes + 8 * trained) + 3 * weight_bytes,
        result_bytes=packed_bytes,
        seconds_per_step=_rounded(seconds_of_steps[-1]),
        seconds=_rounded(sum(seconds)) if steps else training.budget.seconds,
        tokens_per_second=_rounded(training.tokens_per_step / seconds_of_steps[-1]),
        speed=speed.source,
        phases=phases if settings.phases else {},
    )


def student_sizes(training: PlannedTraining) -> tuple[int, int]:
    """Bytes of all that the student holds in float32, and how many weights have a gradient and moments."""
    weights = sum(weight.numel() for weight in training.outline.model.parameters()) + training.scales()
    trained = max(trained_weights(training, phase.settings) for phase in training.phases)
    frozen_copies = any(phase.settings.train == "scales" for phase in training.phases)
    return 4 * weights * (2 if frozen_copies else 1), trained


def memory_bytes(training: PlannedTraining) -> int:
    """Bytes of memory that a training takes at its fullest, on one process."""
    weight_bytes, trained = student_sizes(training)
    memory = step_memory(trained_shape(training, weight_bytes // 4, trained), training.settings, training.device)
    blocks, width = training.settings.reconstruct, training.outline.model.config.get_text_config().hidden_size
    return memory.peak + (2 * blocks.sequences * training.length * width * 4 if blocks else 0)


def trained_shape(training: PlannedTraining, weights: int, trained: int) -> TrainedShape:
    """What the memory of a training depends on.

    Args:
        training: what would be trained.
        weights: that the student holds in float32.
        trained: those of them that have a gradient and moments.
    """
    return TrainedShape(
        model=training.outline.model,
        specs=training.plan.specs(),
        computing=training.computing,
        dtype=training.dtype,
        length=training.length,
        weights=weights,
        trained=trained,
        teacher_bytes=training.teacher_bytes,
    )


def trained_weights(training: PlannedTraining, settings: Distill) -> int:
    """Weights with a gradient and moments in a phase: all of them, or scales and vectors."""
    parameters = list(training.outline.model.parameters())
    vectors = sum(parameter.numel() for parameter in parameters if parameter.ndim < 2)
    everything = sum(parameter.numel() for parameter in parameters)
    return training.scales() + (everything if settings.train == "all" else vectors)


def phase_step_seconds(training: PlannedTraining, phase: ScheduledPhase, speed: Speed) -> float:
    """Estimated seconds of a step of a phase."""
    if speed.tokens_per_second is not None:
        return training.tokens_per_step / speed.tokens_per_second
    assert speed.machine is not None
    settings = phase.settings
    cost = cost_of(training.outline.structure, training.length)
    elsewhere = settings.recording is not None or settings.is_served
    further = 0 if elsewhere else len(settings.teachers)
    passes = float(PASSES + further + settings.gradient_checkpointing)
    passes -= settings.train == "scales"  # no gradient of a matrix
    passes -= elsewhere or not any(loss.needs_teacher for _, loss in phase.terms)
    tokens = round(training.tokens_per_step / training.processes)
    over_weights = weight_passes(training.plan.scales == "learned", training.device)
    return step_seconds(cost, speed.machine, tokens, settings.accumulation, passes, over_weights)


def phase_estimates(training: PlannedTraining, seconds_of_steps: Sequence[float]) -> dict[str, PhaseEstimate]:
    """Steps and seconds of reconstruction and of every phase, by name.

    Args:
        training: knows the phases and the budget.
        seconds_of_steps: seconds of a step of each phase.
    """
    phases, budget = training.phases, training.budget
    estimates, block_seconds = {}, 0.0
    if blocks := training.settings.reconstruct:
        # one step of every layer takes about as long as one step of the whole student, with everything trained
        block_seconds = blocks.steps * max(seconds_of_steps)
        steps = blocks.steps * training.outline.structure.layer_count
        estimates["reconstruct"] = PhaseEstimate(steps=steps, seconds=_rounded(block_seconds))
    phase_steps: list[int] | list[None] = (
        steps_per_phase(phases, budget.steps) if budget.steps else [None] * len(phases)
    )
    seconds_left, begin = max((budget.seconds or 0.0) - block_seconds, 0.0), 0.0
    for number, phase in enumerate(phases, 1):
        count = phase_steps[number - 1]
        seconds = seconds_left * (phase.end - begin) if count is None else count * seconds_of_steps[number - 1]
        name = f"{number} {phase.settings.train}"
        estimates[name] = PhaseEstimate(steps=count, seconds=_rounded(seconds))
        begin = phase.end
    return estimates


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
