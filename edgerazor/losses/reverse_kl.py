"""Reverse KL, `KL(p_S ‖ p_T)`: the student learns to say nothing that the teacher would not say."""

from __future__ import annotations

from torch import Tensor

from edgerazor.losses._base import Loss, Outputs, StepTotals, exact, positive, require_teacher, sample_weights
from edgerazor.losses._kl import mixed_kl


class ReverseKL(Loss):
    """Mode-seeking distillation as in MiniLLM (arXiv 2306.08543): `T²·KL(p_S ‖ p_T)` on given text, without sampling.

    The mean is taken per sample, then over samples.

    Args:
        temperature: `T` > 0; both distributions are softened by it.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = positive("temperature", temperature)

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`)."""
        weights = sample_weights(labels, totals.samples, exact(student.logits.dtype))
        return mixed_kl(student.logits, require_teacher(teacher, self).logits, weights, 1.0, self.temperature)


LOSS = ReverseKL
