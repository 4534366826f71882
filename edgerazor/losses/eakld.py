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
from collections.abc import Mapping

from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.base import positive
from edgerazor.losses.core.kl import entropy, mixed_kl
from edgerazor.losses.core.rows import RowLoss, Rows

#: Mean entropy of the teacher's next-token distribution over the step, in nats; at temperature 1.
ENTROPY = "teacher_entropy"


class EntropyAwareKL(RowLoss):
    """`T²·[γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)]`, mean per sample, then over samples; γ carries no gradient.

    Args:
        temperature: `T` > 0 of both divergences; the entropy is that of the teacher's own distribution (T = 1).
        k: number of equally likely words from which on the teacher counts as unsure, > 1.
        gate: "batch" has one γ for the optimizer step, as published; "token" one for each position, from its own
            entropy.
    """

    def __init__(self, temperature: float = 1.0, k: float = 16.0, gate: str = "batch") -> None:
        self.temperature = positive("temperature", temperature)
        self.k = positive("k", k, above=1.0)
        if gate not in ("batch", "token"):
            raise usage_error(f"The loss option gate is {gate!r}; it must be 'batch' or 'token'.")
        self.gate = gate

    def share(self, entropy: float) -> float:
        """γ, the share of reverse KL, from 0 to 1, for a mean entropy in nats."""
        return min(max(1.0 - entropy / math.log(self.k), 0.0), 1.0)

    def teacher_rows(self, rows: Rows) -> dict[str, Tensor]:
        """Weighted sum of the entropies, in nats."""
        return {ENTROPY: (rows.samples * entropy(rows.log_teacher())).sum()}

    def looks_twice(self) -> bool:
        """See `RowLoss`; a gate of each token asks for nothing beforehand."""
        return self.gate == "batch"

    def rows(self, rows: Rows, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `RowLoss`; the gate of the batch needs `teacher_entropy` in the step's statistics."""
        if self.gate == "token":
            share = (1 - entropy(rows.log_teacher()) / math.log(self.k)).clamp_(0, 1)
            return mixed_kl(rows, share, self.temperature)
        if ENTROPY not in statistics:
            raise ValueError(f"The step's statistics lack {ENTROPY!r}, which decides EAKLD's mixture.")
        return mixed_kl(rows, self.share(statistics[ENTROPY]), self.temperature)


LOSS = EntropyAwareKL
