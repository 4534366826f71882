"""Forward KL, `KL(p_T ‖ p_S)`: the student learns to give probability to everything the teacher might say."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgerazor.losses._base import positive
from edgerazor.losses._kl import mixed_kl
from edgerazor.losses._rows import RowLoss, Rows


class ForwardKL(RowLoss):
    """Classic distillation of Hinton et al. (arXiv 1503.02531): `T²·KL(p_T ‖ p_S)`, mean per sample, then over samples.

    Args:
        temperature: `T` > 0; both distributions are softened by it.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = positive("temperature", temperature)

    def rows(self, rows: Rows, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `RowLoss`."""
        return mixed_kl(rows, 0.0, self.temperature)


LOSS = ForwardKL
