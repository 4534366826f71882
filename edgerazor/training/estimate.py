"""What a training would cost, from one measured step of each phase that is thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from edgerazor import modules
from edgerazor.training.phase_schedule import steps_per_phase
from edgerazor.training.results import DistillDryRun, PhaseEstimate
from edgerazor.training.trainer import Trainer


class StepCost(NamedTuple):
    """What one step of a phase takes.

    Attributes:
        seconds: of a step.
        weight_bytes: of the student's weights in the phase.
        moment_bytes: of the optimizer's moments.
    """

    seconds: float
    weight_bytes: int
    moment_bytes: int


def estimate_training(trainer: Trainer, notation: str, packed_bytes: int) -> DistillDryRun:
    """What a training would take; its student is trained by a few steps and of no further use.

    Args:
        trainer: before its first step.
        notation: of the student's formats.
        packed_bytes: that `pack` would write.
    """
    settings, steps = trainer.settings, trainer.budget.steps
    costs = [measure_step(trainer, number) for number in range(1, len(trainer.phases) + 1)]
    weight_bytes = max(cost.weight_bytes for cost in costs)
    moment_bytes = max(cost.moment_bytes for cost in costs)
    gradient_bytes = moment_bytes // 2
    teacher_bytes = sum(
        p.numel() * p.element_size() for teacher in trainer.teachers for p in teacher.model.parameters()
    )
    shape = trainer.student.model.config.get_text_config()
    logit_bytes = settings.batch_size * trainer.rows.length * shape.vocab_size * 4
    blocks = settings.reconstruct
    block_bytes = 2 * blocks.sequences * trainer.rows.length * shape.hidden_size * 4 if blocks else 0
    phases = phase_estimates(trainer, [cost.seconds for cost in costs])
    seconds = [phase.seconds for phase in phases.values() if phase.seconds is not None] if steps else []
    return DistillDryRun(
        notation=notation,
        steps=steps,
        tokens_per_step=trainer.tokens_per_step,
        memory_bytes=weight_bytes + gradient_bytes + moment_bytes + teacher_bytes + 4 * logit_bytes + block_bytes,
        # the checkpoint and the next one; the students best, last and the one being written
        disk_bytes=2 * (weight_bytes + moment_bytes) + 3 * weight_bytes,
        result_bytes=packed_bytes,
        seconds_per_step=float(f"{costs[-1].seconds:.3g}"),
        seconds=float(f"{sum(seconds):.3g}") if steps else trainer.budget.seconds,
        phases=phases if settings.phases else {},
    )


def measure_step(trainer: Trainer, number: int) -> StepCost:
    """Take two steps of a phase, counted from 1, and measure the second one."""
    trainer.enter_phase(number)
    batches = next(trainer.batches())
    trainer.step(batches)  # the first step also pays for what later ones find ready
    start = time.monotonic()
    trainer.step(batches)
    seconds = time.monotonic() - start
    student = trainer.student.model
    masters = [matrix.master.weight for matrix in modules.fake_quant_weights(student).values() if matrix.master]
    weight_bytes = sum(p.numel() * p.element_size() for p in (*student.parameters(), *masters))
    return StepCost(seconds, weight_bytes, sum(8 * p.numel() for p in student.parameters() if p.requires_grad))


def phase_estimates(trainer: Trainer, step_seconds: Sequence[float]) -> dict[str, PhaseEstimate]:
    """Steps and seconds of reconstruction and of every phase, by name.

    Args:
        trainer: knows the phases and the budget.
        step_seconds: seconds of a step of each phase.
    """
    phases, budget = trainer.phases, trainer.budget
    estimates, block_seconds = {}, 0.0
    if blocks := trainer.settings.reconstruct:
        # one step of every layer takes about as long as one step of the whole student, with everything trained
        block_seconds = blocks.steps * max(step_seconds)
        steps = blocks.steps * trainer.student.structure.layer_count
        estimates["reconstruct"] = PhaseEstimate(steps=steps, seconds=_rounded(block_seconds))
    phase_steps: list[int] | list[None] = (
        steps_per_phase(phases, budget.steps) if budget.steps else [None] * len(phases)
    )
    seconds_left, begin = max((budget.seconds or 0.0) - block_seconds, 0.0), 0.0
    for number, phase in enumerate(phases, 1):
        count = phase_steps[number - 1]
        seconds = seconds_left * (phase.end - begin) if count is None else count * step_seconds[number - 1]
        name = f"{number} {phase.settings.train}"
        estimates[name] = PhaseEstimate(steps=count, seconds=_rounded(seconds))
        begin = phase.end
    return estimates


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.3g}")
