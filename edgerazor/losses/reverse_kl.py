"""Reverse KL, `KL(p_S ‖ p_T)`: the student learns to say nothing that the teacher would not say."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgerazor.losses.core.base import positive
from edgerazor.losses.core.divergences import mixed_kl
from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits


class ReverseKL(LogitLoss):
    """Mode-seeking distillation as in MiniLLM (arXiv 2306.08543): `T²·KL(p_S ‖ p_T)` on given text, without sampling.

    The mean is taken per sample, then over samples.

    Args:
        temperature: `T` > 0; both distributions are softened by it.
    """

    from_recording = "approximate"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = positive("temperature", temperature)

    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `LogitLoss`."""
        return mixed_kl(logits, 1.0, self.temperature)


LOSS = ReverseKL
