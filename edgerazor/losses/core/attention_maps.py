"""Losses of attention maps, a few heads of one sample at a time, from queries and keys to gradients.

A map `softmax(scale·L Rᵀ)` has one entry for every pair of tokens and head: `[B, heads, T, T]` of all layers would be
larger than everything else of a training step together. So of each layer only the factors `L` and `R` are kept; a
block of maps is computed for some heads of one sample, the loss gives its value and its gradient with respect to the
scores, the gradient is propagated to `L` and `R` at once, and the block is freed.

Rows of a map are queries. A query counts where its token predicts something, as in every other loss; it attends to the
keys that the model's own attention mask allows. The mean is taken over layers and heads, per sample, then over the
step's samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgerazor.losses.core.base import (
    Attention,
    GradientsInForward,
    Loss,
    Outputs,
    StepTotals,
    compute_dtype,
    prediction_mask,
    require_teacher,
)
from edgerazor.losses.core.layer_selection import explicit_layers, parse_layers_option, resolve_layers

#: Entries of the maps that are computed at a time; on a CPU few enough for the cache.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
DEFAULT_BLOCK_ELEMENTS = 1 << 24
#: Score of a key that the mask hides: its probability is exactly 0, and differences of two such scores stay finite.
MASKED_SCORE = -1e30


class ScoreFactors(NamedTuple):
    """From which one model's scores of a layer are computed: `scale·left rightᵀ`, capped.

    Attributes:
        left: `[B, heads, T, d]`, such as the queries.
        right: `[B, right heads, T, d]`, such as the keys; grouped heads of `left` share one.
        scale: factor of the scores.
        cap: soft cap, the largest absolute value of a score, or None.
        attention: of the layer, whose mask applies.
    """

    left: Tensor
    right: Tensor
    scale: float
    cap: float | None
    attention: Attention

    def right_heads(self, heads: slice) -> Tensor:
        """For each of some heads of `left`, the head of `right` that it is multiplied with, int64."""
        groups = self.left.shape[1] // self.right.shape[1]
        return torch.arange(self.left.shape[1], device=self.left.device)[heads] // groups


class AttentionMapLoss(Loss):
    """A loss that is a mean over layers, heads and samples of a function of the student's and the teacher's map.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
    """

    #: Which two fields of `Attention` are multiplied; the losses of several pairs are averaged.
    pairs: tuple[tuple[str, str], ...] = (("query", "key"),)

    def __init__(self, layers: str | int | tuple[int | str, ...] = "all") -> None:
        self.requested_layers = parse_layers_option(layers)
        self.layers = explicit_layers(self.requested_layers)

    def choose_layers(self, layer_count: int, layer_metrics: Mapping[str, Sequence[float]]) -> None:
        """See `Loss`."""
        self.layers = resolve_layers(self.requested_layers, layer_count)

    def attention_layers(self) -> tuple[int, ...]:
        """See `Loss`."""
        return self.layers

    def score_factors(self, attention: Attention, pair: tuple[str, str]) -> ScoreFactors:
        """The factors of a model's scores in a layer; ValueError where one was not captured."""
        left, right = getattr(attention, pair[0]), getattr(attention, pair[1])
        if left is None or right is None:
            raise ValueError(f"{type(self).__name__} needs {pair[0]} and {pair[1]} of a layer, and one is missing.")
        return ScoreFactors(left, right, attention.scale, attention.cap, attention)

    @abstractmethod
    def value_and_grad(self, student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of some heads of one sample.

        Args:
            student_scores: `[h, n, keys]` of the `n` queries that count, float32 or float64, `MASKED_SCORE` where
                masked; may be overwritten.
            teacher_scores: the teacher's scores, of the same shape and dtype; may be overwritten.

        Returns:
            the loss, mean over queries, summed over the heads; and its gradient with respect to `student_scores`.
        """

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); ValueError for missing attention or other numbers of heads."""
        teacher = require_teacher(teacher, self)
        if not self.layers:
            raise ValueError(f"{type(self).__name__} has not been told how many layers the model has.")
        factor = 1 / (len(self.layers) * len(self.pairs) * max(totals.samples, 1))
        parts = []
        for layer in self.layers:
            for pair in self.pairs:
                student_factors = self.score_factors(layer_attention(student, layer), pair)
                teacher_factors = self.score_factors(layer_attention(teacher, layer), pair)
                parts.append(_layer_loss(self, student_factors, teacher_factors, labels, factor))
        return torch.stack(parts).sum()


def layer_attention(outputs: Outputs, layer: int) -> Attention:
    """The inputs of a layer's attention; ValueError where they were not captured."""
    if layer not in outputs.attention:
        raise ValueError(f"The attention of layer {layer} is missing; present are {sorted(outputs.attention)}.")
    return outputs.attention[layer]


def _layer_loss(
    loss: AttentionMapLoss, student: ScoreFactors, teacher: ScoreFactors, labels: Tensor, factor: float
) -> Tensor:
    """`factor·Σ over samples, mean over heads`, a scalar through which the gradient reaches the student's factors."""
    if student.left.shape[:3] != teacher.left.shape[:3]:
        raise _incomparable(student.left, teacher.left, "student")
    if student.left[:, 0, :, 0].shape != labels.shape:
        raise _incomparable(student.left[:, 0, :, 0], labels, "labels")
    arguments = (loss, student, teacher, prediction_mask(labels), factor)
    total: Tensor = _LayerLoss.apply(student.left, student.right, arguments)
    return total


def _incomparable(first: Tensor, second: Tensor, name: str) -> ValueError:
    return ValueError(f"Maps of {tuple(first.shape)} cannot be compared with {tuple(second.shape)} ({name}).")


@dataclass(frozen=True)
class _Block:
    """Some heads of one sample, the queries that count, and the keys up to the last of these."""

    sample: int
    heads: slice
    queries: Tensor
    keys: int

    def scores(self, factors: ScoreFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Left `[h, n, d]`, right `[h, keys, d]` and the scores `[h, n, keys]` before mask and cap, all in `dtype`."""
        left = factors.left.detach()[self.sample, self.heads].index_select(1, self.queries).to(dtype)
        right_heads = factors.right_heads(self.heads)
        right = factors.right.detach()[self.sample, :, : self.keys].index_select(0, right_heads).to(dtype)
        return left, right, (left @ right.mT).mul_(factors.scale)

    def masked(self, factors: ScoreFactors, scores: Tensor) -> Tensor:
        """The scores as the model's softmax is given them, capped and masked; works in place."""
        if factors.cap is not None:
            scores = scores.div_(factors.cap).tanh_().mul_(factors.cap)
        return scores.masked_fill_(~factors.attention.allowed(self.sample, self.queries, self.keys), MASKED_SCORE)


def _blocks(factors: ScoreFactors, mask: Tensor) -> Iterator[_Block]:
    """All samples in which a position counts, a few heads at a time."""
    elements = BLOCK_ELEMENTS.get(mask.device.type, DEFAULT_BLOCK_ELEMENTS)
    heads = factors.left.shape[1]
    for sample in mask.any(1).nonzero().flatten().tolist():
        queries = mask[sample].nonzero().flatten()
        keys = int(queries[-1]) + 1  # attention is causal, so no query that counts attends to later keys
        height = max(1, elements // (len(queries) * keys))
        for start in range(0, heads, height):
            yield _Block(sample, slice(start, min(start + height, heads)), queries, keys)


class _LayerLoss(GradientsInForward):
    """The pass over all blocks of a layer. Forward computes the gradients, too."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, arguments: tuple) -> Tensor:
        loss, student, teacher, mask, factor = arguments
        dtype = compute_dtype(left.dtype)
        total = left.new_zeros((), dtype=dtype)
        left_grad, right_grad = (
            torch.zeros_like(operand, dtype=dtype, memory_format=torch.contiguous_format) if needed else None
            for operand, needed in zip((left, right), ctx.needs_input_grad, strict=False)
        )
        factor /= left.shape[1]
        with torch.autocast(left.device.type, enabled=False):
            for block in _blocks(student, mask):
                block_left, block_right, scores = block.scores(student, dtype)
                teacher_scores = block.masked(teacher, block.scores(teacher, dtype)[2])
                # derivative of the soft cap, before `masked` overwrites the scores
                slope = None if student.cap is None else 1 - torch.tanh(scores / student.cap).square_()
                value, grad = loss.value_and_grad(block.masked(student, scores), teacher_scores)
                total.add_(value, alpha=factor)
                grad = grad.mul_(factor * student.scale)
                grad = grad if slope is None else grad.mul_(slope)
                if left_grad is not None:
                    left_grad[block.sample, block.heads].index_add_(1, block.queries, grad @ block_right)
                if right_grad is not None:
                    part = right_grad[block.sample, :, : block.keys]
                    part.index_add_(0, student.right_heads(block.heads), grad.mT @ block_left)
        ctx.save_for_backward(
            None if left_grad is None else left_grad.to(left.dtype),
            None if right_grad is None else right_grad.to(right.dtype),
        )
        return total


def attention_map_kl(student_scores: Tensor, teacher_scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`T²·KL(softmax(teacher / T) ‖ softmax(student / T))` of each query (see `AttentionMapLoss.value_and_grad`).

    The gradient with respect to the student's scores is `T·(p_S - p_T)`.
    """
    log_s, log_t = (torch.log_softmax(scores / temperature, dim=-1) for scores in (student_scores, teacher_scores))
    p_t = log_t.exp()
    queries = student_scores.shape[1]
    value = torch.linalg.vecdot(p_t, log_t.sub_(log_s)).sum() * (temperature**2 / queries)
    return value, log_s.exp_().sub_(p_t).mul_(temperature / queries)
