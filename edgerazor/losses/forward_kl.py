"""Forward KL, `KL(p_T ‖ p_S)`: the student learns to give probability to everything the teacher might say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.base import positive
from edgerazor.losses.core.divergences import mixed_kl
from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits


class ForwardKL(LogitLoss):
    """Classic distillation of Hinton et al. (arXiv 1503.02531): `T²·KL(p_T ‖ p_S)`, mean per sample, then over samples.

    Args:
        temperature: `T` > 0; both distributions are softened by it.
        reduction: over the positions of a sample, "mean", or "sum" as EdgeQAT has it (`batchmean` of PyTorch; arXiv
            2402.10787, its code). A sum weighs as many times more against other losses as a sample has positions.
    """

    from_recording = "unbiased"

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        self.temperature = positive("temperature", temperature)
        if reduction not in ("mean", "sum"):
            raise usage_error(f"The loss option reduction is {reduction!r}; it must be 'mean' or 'sum'.")
        self.reduction = reduction

    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `LogitLoss`."""
        weights = torch.full_like(logits.sample_weights, logits.batch_weight) if self.reduction == "sum" else None
        return mixed_kl(logits, 0.0, self.temperature, weights)


LOSS = ForwardKL
