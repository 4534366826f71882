"""Router z-loss: the logits of routers stay small, where rounding them to 16 bits changes little.

    loss = mean over layers, tokens of a sample, and samples of (log Σ_i exp z_i)²

Source: ST-MoE (arXiv 2202.08906, equation 5), with the weight 0.001 there and in OLMoE (arXiv 2409.02060).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.losses.core.base import Outputs, StepTotals, sample_weights
from edgerazor.losses.core.routing import RouterLoss


class RouterZ(RouterLoss):
    """`(log Σ exp z)²` of router logits, mean over layers, tokens and samples. It compares with no teacher."""

    needs_teacher = False

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`)."""
        squares = [logits.logsumexp(-1).square() for _, logits in self.logits(student)]  # [B, T] each
        mean = torch.stack(squares).mean(0)
        return (mean * sample_weights(labels, totals.samples, mean.dtype)).sum()


LOSS = RouterZ
