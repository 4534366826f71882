"""KL between attention maps: the student attends to the tokens that the teacher attends to.

    loss = mean over layers, heads and queries of KL(A_T ‖ A_S),   A = softmax(q kᵀ·scale) under the model's mask

Source: attention transfer of MiniLM (arXiv 2002.10957, section 3.1), which EdgeRazor (arXiv 2605.04062) offers too.
"""

from __future__ import annotations

from torch import Tensor

from edgerazor.losses.core.attention_maps import AttentionMapLoss, attention_map_kl
from edgerazor.losses.core.base import positive


class AttentionKL(AttentionMapLoss):
    """`T²·KL(A_T ‖ A_S)`, mean over layers, heads and the queries of a sample, then over samples.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
        temperature: `T` > 0; the scores of both are divided by it.
    """

    attention_parts = ("query", "key")

    def __init__(self, layers: str | int | tuple[int | str, ...] = "all", temperature: float = 1.0) -> None:
        super().__init__(layers)
        self.temperature = positive("temperature", temperature)

    def value_and_grad(self, student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionMapLoss`."""
        return attention_map_kl(student_scores, teacher_scores, self.temperature)


LOSS = AttentionKL
