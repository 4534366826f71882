"""Self-relation: tokens whose values (or keys) are alike for the teacher are alike for the student.

    loss = mean over layers, heads and tokens of KL(R_T ‖ R_S),   R = softmax(v vᵀ / sqrt d)

under the attention mask, so that a token is related to itself and to the tokens that it attends to. Source: MiniLM
(arXiv 2002.10957, section 3.2) and MiniLMv2 (arXiv 2012.15828, section 3.1), where padding is the only mask; EdgeRazor
offers both parts.
"""

from __future__ import annotations

from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.attention_maps import AttentionMapLoss, ScoreFactors, attention_map_kl
from edgerazor.losses.core.base import Attention, positive

#: option -> the fields of `Attention` of which each is multiplied with itself
PARTS = {"query": ("query",), "key": ("key",), "value": ("value",), "both": ("key", "value")}


class Relation(AttentionMapLoss):
    """`T²·KL(R_T ‖ R_S)`, mean over layers, key heads and the tokens of a sample, then over samples.

    Args:
        of: "value", "key" (behind the rotary embedding), "both" of them, or "query".
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
        temperature: `T` > 0; the scores of both are divided by it.
    """

    def __init__(
        self, of: str = "value", layers: str | int | tuple[int | str, ...] = "all", temperature: float = 1.0
    ) -> None:
        super().__init__(layers)
        if of not in PARTS:
            raise usage_error(f"The loss option of is {of!r}; it must be one of {', '.join(PARTS)}.")
        self.attention_parts = PARTS[of]
        self.pairs = tuple((part, part) for part in PARTS[of])
        self.temperature = positive("temperature", temperature)

    def score_factors(self, attention: Attention, pair: tuple[str, str]) -> ScoreFactors:
        """See `AttentionMapLoss`; relations are scaled by their own number of features and never capped."""
        left, right, _, _, _ = super().score_factors(attention, pair)
        return ScoreFactors(left, right, left.shape[-1] ** -0.5, None, attention)

    def value_and_grad(self, student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionMapLoss`."""
        return attention_map_kl(student_scores, teacher_scores, self.temperature)


LOSS = Relation
