"""Confidence-aware KL (CAKLD): the teacher's confidence in the text itself mixes reverse and forward KL.

    γ = mean of p_T(next token)        CAKLD = γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)

The mean is per sample over its tokens, then over the step's samples. Source: BitDistiller (arXiv 2402.10631,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgerazor.losses.core.base import positive
from edgerazor.losses.core.divergences import mixed_kl, target_log_probs
from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits

#: Name of the statistic: mean probability that the teacher gives to the tokens of the text.
CONFIDENCE = "teacher_confidence"


class ConfidenceAwareKL(LogitLoss):
    """`T²·[γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)]`, mean per sample, then over samples; γ carries no gradient.

    Args:
        temperature: `T` > 0 of both divergences; the confidence is that of the teacher's own distribution (T = 1).
    """

    from_recording = "approximate"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = positive("temperature", temperature)

    def partial_statistics(self, logits: TokenLogits) -> dict[str, Tensor]:
        """Weighted sum of the teacher's probabilities of the targets."""
        return {CONFIDENCE: (logits.sample_weights * target_log_probs(logits).exp()).sum()}

    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `LogitLoss`; needs `teacher_confidence` in the step's statistics."""
        return mixed_kl(logits, statistics[CONFIDENCE], self.temperature)


LOSS = ConfidenceAwareKL
