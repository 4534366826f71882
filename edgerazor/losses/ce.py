"""Cross entropy with the text itself: the mean over the step's tokens of `-log p_S(next token)`, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgerazor.losses._base import MASKED, Loss, Outputs, StepTotals, exact, predicting


class CrossEntropy(Loss):
    """Language modelling, the task itself; the only loss that needs no teacher."""

    needs_teacher = False

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """Sum of the cross entropies of a micro-batch's tokens, divided by the tokens of the step (see `Loss`)."""
        targets = torch.roll(labels, -1, dims=1).masked_fill(~predicting(labels), MASKED)  # [B, T]
        logits = student.logits.to(exact(student.logits.dtype)).flatten(0, 1)  # [B·T, V]
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=MASKED, reduction="sum")
        return total / max(totals.tokens, 1)


LOSS = CrossEntropy
