"""Entropy-aware KL (EAKLD): how sure the teacher is decides which way the student is pulled.

Forward KL spreads the student over everything the teacher might say; reverse KL concentrates it on what the teacher
says most. A small student does better to concentrate where its teacher is sure, and to spread where it is not. So one
coefficient mixes both, from the teacher's entropy `H` alone:

    γ = clamp(1 - H / ln k, 0, 1),  k = 16        EAKLD = γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)

where `H` is the mean over the step's samples of the mean over their tokens. A teacher that hesitates between `k`
words or more gives γ = 0, plain forward KL. Source: EdgeRazor, arXiv 2605.04062.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.base import positive
from edgerazor.losses.core.divergences import mixed_kl, teacher_entropy
from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits

#: Name of the statistic: mean entropy of the teacher's next-token distribution over the step, in nats, temperature 1.
ENTROPY = "teacher_entropy"


class EntropyAwareKL(LogitLoss):
    """`T²·[γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)]`, mean per sample, then over samples; γ carries no gradient.

    Args:
        temperature: `T` > 0 of both divergences; the entropy is that of the teacher's own distribution (T = 1).
        k: number of equally likely tokens from which on the teacher counts as unsure, > 1.
        gate: "batch" has one γ for the optimizer step, as published; "token" one for each position, from its own
            entropy.
    """

    from_recording = "approximate"

    def __init__(self, temperature: float = 1.0, k: float = 16.0, gate: str = "batch") -> None:
        self.temperature = positive("temperature", temperature)
        self.k = positive("k", k, above=1.0)
        if gate not in ("batch", "token"):
            raise usage_error(f"The loss option gate is {gate!r}; it must be 'batch' or 'token'.")
        self.gate = gate

    def gamma(self, entropy: float) -> float:
        """γ, the share of reverse KL, from 0 to 1, for a mean entropy in nats."""
        return min(max(1.0 - entropy / math.log(self.k), 0.0), 1.0)

    def partial_statistics(self, logits: TokenLogits) -> dict[str, Tensor]:
        """Weighted sum of the entropies, in nats."""
        return {ENTROPY: (logits.sample_weights * teacher_entropy(logits)).sum()}

    def statistics_need_logits(self) -> bool:
        """See `LogitLoss`; a gate of each token needs no statistics of the step."""
        return self.gate == "batch"

    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `LogitLoss`; the gate of the batch needs `teacher_entropy` in the step's statistics."""
        if self.gate == "token":
            gamma = (1 - teacher_entropy(logits) / math.log(self.k)).clamp_(0, 1)
            return mixed_kl(logits, gamma, self.temperature)
        if ENTROPY not in statistics:
            raise ValueError(f"The step's statistics lack {ENTROPY!r}, which decides EAKLD's mixture.")
        return mixed_kl(logits, self.gamma(statistics[ENTROPY]), self.temperature)


LOSS = EntropyAwareKL
