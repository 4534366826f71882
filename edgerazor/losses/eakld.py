"""Entropy-aware KL (EAKLD): how sure the teacher is decides which way the student is pulled.

Forward KL spreads the student over everything the teacher might say; reverse KL concentrates it where the teacher
is. A small student of a sure teacher does better concentrating, that of an unsure teacher spreading. So one
coefficient mixes both, from the teacher's entropy `H` alone:

    γ = clamp(1 - H / ln k, 0, 1),  k = 16        EAKLD = γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)

where `H` is the mean over the step's samples of the mean over their tokens. A teacher that hesitates between `k`
words or more gives γ = 0, plain forward KL. Source: EdgeRazor, arXiv 2605.04062.
"""

from __future__ import annotations

import math

from torch import Tensor

from edgerazor.losses._base import Loss, Outputs, StepTotals, exact, positive, require_teacher, sample_weights
from edgerazor.losses._kl import entropy_sum, mixed_kl

#: Mean entropy of the teacher's next-token distribution over the step, in nats; at temperature 1.
ENTROPY = "teacher_entropy"


class EntropyAwareKL(Loss):
    """`T²·[γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)]`, mean per sample, then over samples; γ carries no gradient.

    Args:
        temperature: `T` > 0 of both divergences; the entropy is that of the teacher's own distribution (T = 1).
        k: number of equally likely words from which on the teacher counts as unsure, > 1.
    """

    def __init__(self, temperature: float = 1.0, k: float = 16.0) -> None:
        self.temperature = positive("temperature", temperature)
        self.k = positive("k", k, above=1.0)

    def gate(self, entropy: float) -> float:
        """γ, the share of reverse KL, from 0 to 1, for a mean entropy in nats."""
        return min(max(1.0 - entropy / math.log(self.k), 0.0), 1.0)

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Sum over samples of the mean entropy of their tokens, in nats."""
        weights = sample_weights(labels, 1, exact(teacher.logits.dtype))
        return {ENTROPY: entropy_sum(teacher.logits, weights)}

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); needs `teacher_entropy` in the step's statistics."""
        logits = require_teacher(teacher, self).logits
        if ENTROPY not in totals.statistics:
            raise ValueError(f"The step's statistics lack {ENTROPY!r}, which decides EAKLD's mixture.")
        weights = sample_weights(labels, totals.samples, exact(student.logits.dtype))
        return mixed_kl(student.logits, logits, weights, self.gate(totals.statistics[ENTROPY]), self.temperature)


LOSS = EntropyAwareKL
