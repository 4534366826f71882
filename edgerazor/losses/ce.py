"""Cross entropy with the text itself: the mean over the step's tokens of `-log p_S(next token)`, in nats."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits


class CrossEntropy(LogitLoss):
    """Language modelling, the task itself; the only loss of next-token logits that needs no teacher."""

    needs_teacher = False

    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Gradient: `p_S - onehot(target)`, divided by the tokens of the step (see `LogitLoss`)."""
        log_probs, targets, weight = logits.student_log_probs(), logits.targets[:, None], logits.token_weight
        value = -log_probs.gather(1, targets).sum() * weight
        gradient = logits.student_probs() * weight
        return value, gradient.scatter_add_(1, targets, log_probs.new_full(targets.shape, -weight))


LOSS = CrossEntropy
