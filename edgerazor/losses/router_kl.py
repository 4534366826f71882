"""KL between routers: the student sends a token where the teacher sends it.

    loss = mean over layers, tokens of a sample, and samples of KL(g_T ‖ g_S),   g = softmax(z)

The logits z of each layer's router are compared over all experts, chosen or not, also where a model scores experts by
sigmoids: their order is that of the logits. A low-bit student whose routers drift computes with other experts than the
teacher's, whose weights say nothing of what it should compute there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.losses.core.base import Outputs, StepTotals, require_teacher, sample_weights
from edgerazor.losses.core.routing import RouterLoss


class RouterKL(RouterLoss):
    """`KL(g_T ‖ g_S)`, mean over layers, tokens and samples."""

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); ValueError where models have routers in different layers."""
        theirs = dict(self.logits(require_teacher(teacher, self)))
        layers = []
        for layer, logits in self.logits(student):
            if layer not in theirs or theirs[layer].shape != logits.shape:
                raise ValueError(f"The teacher has no such router in layer {layer}.")
            layers.append(_divergence(logits, theirs[layer].detach()))
        mean = torch.stack(layers).mean(0)  # [B, T]
        return (mean * sample_weights(labels, totals.samples, mean.dtype)).sum()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the teacher's distribution to the student's, `[B, T]`, of logits `[B, T, E]`.

    The gradient with respect to the student's logits is the difference of both distributions. Autograd's would not be
    exactly 0 where they are equal.
    """
    log_t, log_s = teacher.log_softmax(-1), student.detach().log_softmax(-1)
    value = (log_t.exp() * (log_t - log_s)).sum(-1)
    gradient = log_s.exp() - log_t.exp()
    return value + (gradient * (student - student.detach())).sum(-1)


LOSS = RouterKL
