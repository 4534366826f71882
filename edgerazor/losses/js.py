"""Jensen-Shannon divergence: both models are compared with their mixture, which neither can be far from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.base import positive
from edgerazor.losses.core.divergences import jensen_shannon
from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits


class JensenShannon(LogitLoss):
    """Generalized Jensen-Shannon divergence (arXiv 2306.13649), times `T²`, mean per sample, then over samples.

    Args:
        beta: weight of the teacher in the mixture, between 0 and 1; near 0 it behaves like forward, near 1 like
            reverse KL.
        temperature: `T` > 0; both distributions are softened by it.
    """

    from_recording = "approximate"

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        self.beta = positive("beta", beta)
        if self.beta >= 1:
            raise usage_error(f"The loss option beta is {beta!r}; it must be between 0 and 1.")
        self.temperature = positive("temperature", temperature)

    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """See `LogitLoss`."""
        return jensen_shannon(logits, self.beta, self.temperature)


LOSS = JensenShannon
