"""Cross entropy with the text itself: the mean over the step's tokens of `-log p_S(next token)`, in nats."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgerazor.losses.core.rows import RowLoss, Rows


class CrossEntropy(RowLoss):
    """Language modelling, the task itself; the only loss of next tokens that needs no teacher."""

    needs_teacher = False

    def rows(self, rows: Rows, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Gradient: `p_S - onehot(target)`, by the tokens of the step (see `RowLoss`)."""
        log_p, target = rows.log_student(), rows.targets[:, None]
        value = -log_p.gather(1, target).sum() * rows.tokens
        gradient = rows.p_student() * rows.tokens
        return value, gradient.scatter_add_(1, target, log_p.new_full(target.shape, -rows.tokens))


LOSS = CrossEntropy
