"""EdgeQAT's entropy guidance: queries and keys keep their information although low-bit weights compute them.

    loss = -β·log Σ over layers, mean over tokens and heads, of [ln(1 + var q) + ln(1 + var k)]

The entropy of a roughly Gaussian vector grows with the logarithm of its variance (here over the features of a head),
and low-bit weights reduce it. Source: EdgeQAT (arXiv 2402.10787, entropy guidance). The authors' code takes one
logarithm of the sum over a whole batch, which does not add up over micro-batches; here it is taken per sample, with a
mean over tokens and heads in the place of the sum, which changes the loss by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgerazor.losses.core.attention_maps import layer_attention
from edgerazor.losses.core.base import (
    Loss,
    Outputs,
    StepTotals,
    compute_dtype,
    positive,
    prediction_mask,
    sample_weights,
)
from edgerazor.losses.core.layer_selection import explicit_layers, parse_layers_option, resolve_layers


class QueryKeyEntropy(Loss):
    """`-β·log Σ_layers [ln(1 + var q) + ln(1 + var k)]`, mean over samples; it may be negative.

    Variances are unbiased, over the features of a head; tokens count where they predict something.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
        beta: `β` > 0.
    """

    needs_teacher = False
    attention_parts = ("query", "key")

    def __init__(self, layers: str | int | tuple[int | str, ...] = "all", beta: float = 0.5) -> None:
        self.requested_layers = parse_layers_option(layers)
        self.layers = explicit_layers(self.requested_layers)
        self.beta = positive("beta", beta)

    def choose_layers(self, layer_count: int, layer_metrics: Mapping[str, Sequence[float]]) -> None:
        """See `Loss`."""
        self.layers = resolve_layers(self.requested_layers, layer_count)

    def attention_layers(self) -> tuple[int, ...]:
        """See `Loss`."""
        return self.layers

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); ValueError where a layer's queries or keys are missing."""
        if not self.layers:
            raise ValueError("The entropy guidance has not been told how many layers the model has.")
        log_variances = []
        for layer in self.layers:
            attention = layer_attention(student, layer)
            if attention.query is None or attention.key is None:
                raise ValueError(f"The queries or keys of layer {layer} are missing.")
            log_variances += [_log_variance(attention.query), _log_variance(attention.key)]  # [B, T]
        weights = sample_weights(labels, 1, log_variances[0].dtype)
        sample_sums = (torch.stack(log_variances).sum(0) * weights).sum(1)  # [B]
        counted_samples = prediction_mask(labels).any(1)
        return -self.beta * sample_sums[counted_samples].log().sum() / max(totals.samples, 1)


def _log_variance(vectors: Tensor) -> Tensor:
    """`[B, heads, T, d]` -> `[B, T]`: mean over heads of `ln(1 + var)`, float32 (float64 for float64 vectors)."""
    return vectors.to(compute_dtype(vectors.dtype)).var(dim=-1).log1p().mean(1)


LOSS = QueryKeyEntropy
