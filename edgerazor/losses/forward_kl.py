"""Forward KL, `KL(p_T ‖ p_S)`: the student learns to give probability to everything the teacher might say."""

from __future__ import annotations

from torch import Tensor

from edgerazor.losses._base import Loss, Outputs, StepTotals, exact, positive, require_teacher, sample_weights
from edgerazor.losses._kl import mixed_kl


class ForwardKL(Loss):
    """Classic distillation of Hinton et al. (arXiv 1503.02531): `T²·KL(p_T ‖ p_S)`, mean per sample, then over samples.

    Args:
        temperature: `T` > 0; both distributions are softened by it.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = positive("temperature", temperature)

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`)."""
        weights = sample_weights(labels, totals.samples, exact(student.logits.dtype))
        return mixed_kl(student.logits, require_teacher(teacher, self).logits, weights, 0.0, self.temperature)


LOSS = ForwardKL
