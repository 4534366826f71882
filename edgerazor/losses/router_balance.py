"""Load balance: tokens are spread over the experts, so that none is left out and none does everything.

    loss = mean over layers and samples of E · Σ_i f_i P_i

E experts; f_i is the share of a sample's tokens that are sent to expert i (together they are k, as many as are chosen
for a token), P_i the mean probability that its router gives expert i. Even routing gives k. Only P has a gradient.

Source: Switch Transformers (arXiv 2101.03961, equations 4 to 6); with more than one expert for a token, and the usual
weight of 0.01, OLMoE (arXiv 2409.02060). There f and P are means over a batch, whose product does not add up over
micro-batches; here they are means over a sample, as in DeepSeek-V2 (arXiv 2405.04434, expert-level balance).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.losses.core.base import Outputs, StepTotals, sample_weights
from edgerazor.losses.core.routing import RouterLoss


class RouterBalance(RouterLoss):
    """`E · Σ f_i P_i`, mean over layers, then over samples. It compares with no teacher."""

    needs_teacher = False

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`)."""
        chosen = {layer: routing.chosen for layer, routing in self.routings(student)}
        layers = []
        for layer, logits in self.logits(student):
            weights = sample_weights(labels, 1, logits.dtype).unsqueeze(-1)  # [B, T, 1]
            probability = (weights * logits.softmax(-1)).sum(1)  # [B, E]
            sent = torch.zeros_like(logits).scatter(-1, chosen[layer], 1.0)
            share = (weights * sent).sum(1)  # [B, E]
            layers.append(logits.shape[-1] * (share * probability).sum())
        return torch.stack(layers).mean() / max(totals.samples, 1)


LOSS = RouterBalance
