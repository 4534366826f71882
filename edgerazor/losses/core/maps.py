"""Losses of attention maps, a few heads of one sample at a time, from queries and keys to gradients.

A map `softmax(scale·L Rᵀ)` has one entry for every pair of tokens and head: `[B, heads, T, T]` of all layers would be
larger than everything else of a training step together. So a layer keeps only what its map is made of; a loss makes a
map of some heads of one sample, gives its value and its gradient with respect to the scores, the gradient goes back to
`L` and `R` at once, and the map is forgotten.

Rows of a map are queries. A row counts where its token predicts something, as in every other loss; of its keys it sees
what the model's own attention lets it see. The mean is taken over layers and heads, per sample, then over the step's
samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgerazor.losses.core.base import Attention, Loss, Outputs, StepTotals, exact, predicting, require_teacher
from edgerazor.losses.core.layers import fixed, layers_option, numbered

#: Entries of the maps that are worked on at a time; on a CPU few enough for the cache.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
DEFAULT_BLOCK_ELEMENTS = 1 << 24
#: Score of a key that a query may not see: its probability is exactly 0, and differences of two stay finite.
UNSEEN = -1e30


class Sides(NamedTuple):
    """What one model's maps of a layer are made of: `scale·left rightᵀ`, capped; `left [B, heads, T, d]`."""

    left: Tensor
    right: Tensor
    scale: float
    cap: float | None
    attention: Attention

    def heads_of(self, heads: slice) -> Tensor:
        """For each of some heads of `left`, the head of `right` that it looks at, int64."""
        groups = self.left.shape[1] // self.right.shape[1]
        return torch.arange(self.left.shape[1], device=self.left.device)[heads] // groups


class MapLoss(Loss):
    """A loss that is a mean over layers, heads and samples of a function of the student's and the teacher's map.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
    """

    #: Which two parts of `Attention` make a map; several pairs are averaged.
    pairs: tuple[tuple[str, str], ...] = (("query", "key"),)

    def __init__(self, layers: str | int | tuple[int | str, ...] = "all") -> None:
        self.wanted = layers_option(layers)
        self.layers = fixed(self.wanted)

    def choose_layers(self, count: int, measured: Mapping[str, Sequence[float]]) -> None:
        """See `Loss`."""
        self.layers = numbered(self.wanted, count)

    def attention_layers(self) -> tuple[int, ...]:
        """See `Loss`."""
        return self.layers

    def sides(self, attention: Attention, pair: tuple[str, str]) -> Sides:
        """What a model's map of a layer is made of."""
        left, right = getattr(attention, pair[0]), getattr(attention, pair[1])
        if left is None or right is None:
            raise ValueError(f"{type(self).__name__} needs {pair[0]} and {pair[1]} of a layer, and one is missing.")
        return Sides(left, right, attention.scale, attention.cap, attention)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Some heads of one sample.

        Args:
            student: scores `[h, n, keys]` of `n` queries that count, float32 or float64, `UNSEEN` where masked.
            teacher: the same of the teacher; both may be overwritten.

        Returns:
            the loss, mean over queries, summed over the heads; and its gradient with respect to `student`.
        """

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); ValueError for missing attention or other numbers of heads."""
        seen = require_teacher(teacher, self)
        if not self.layers:
            raise ValueError(f"{type(self).__name__} has not been told how many layers the model has.")
        factor = 1 / (len(self.layers) * len(self.pairs) * max(totals.samples, 1))
        parts = [
            _map_loss(self, self.sides(layer_attention(student, layer), pair), other, labels, factor)
            for layer in self.layers
            for pair in self.pairs
            for other in [self.sides(layer_attention(seen, layer), pair)]
        ]
        return torch.stack(parts).sum()


def layer_attention(outputs: Outputs, layer: int) -> Attention:
    """What entered a layer's attention; ValueError where the model was not asked for it."""
    if layer not in outputs.attention:
        raise ValueError(f"The attention of layer {layer} is missing; present are {sorted(outputs.attention)}.")
    return outputs.attention[layer]


def _map_loss(loss: MapLoss, ours: Sides, theirs: Sides, labels: Tensor, factor: float) -> Tensor:
    """`factor·Σ over samples, mean over heads`, a scalar through which the gradient reaches left and right."""
    for name, left, right in (("student", ours.left, theirs.left), ("labels", ours.left[:, 0, :, 0], labels)):
        same = left.shape[:3] == right.shape[:3] if name == "student" else left.shape == right.shape
        if not same:
            raise ValueError(f"Maps of {tuple(left.shape)} cannot be compared with {tuple(right.shape)} ({name}).")
    total: Tensor = _Maps.apply(ours.left, ours.right, (loss, ours, theirs, predicting(labels), factor))
    return total


@dataclass(frozen=True)
class _Block:
    """Some heads of one sample, the queries that count, and the keys up to the last of these."""

    sample: int
    heads: slice
    queries: Tensor
    keys: int

    def scores(self, sides: Sides, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Left `[h, n, d]`, right `[h, keys, d]` and the scores `[h, n, keys]` before mask and cap, all in `dtype`."""
        left = sides.left.detach()[self.sample, self.heads].index_select(1, self.queries).to(dtype)
        right = sides.right.detach()[self.sample, :, : self.keys].index_select(0, sides.heads_of(self.heads)).to(dtype)
        return left, right, (left @ right.mT).mul_(sides.scale)

    def masked(self, sides: Sides, scores: Tensor) -> Tensor:
        """The scores as the model's softmax sees them; works in place."""
        if sides.cap is not None:
            scores = scores.div_(sides.cap).tanh_().mul_(sides.cap)
        return scores.masked_fill_(~sides.attention.allowed(self.sample, self.queries, self.keys), UNSEEN)


def _blocks(sides: Sides, mask: Tensor) -> Iterator[_Block]:
    """All samples in which a position counts, a few heads at a time."""
    elements = BLOCK_ELEMENTS.get(mask.device.type, DEFAULT_BLOCK_ELEMENTS)
    for sample in mask.any(1).nonzero().flatten().tolist():
        queries = mask[sample].nonzero().flatten()
        keys = int(queries[-1]) + 1  # nobody looks ahead, so later keys are seen by no query that counts
        height = max(1, elements // (len(queries) * keys))
        for start in range(0, sides.left.shape[1], height):
            yield _Block(sample, slice(start, min(start + height, sides.left.shape[1])), queries, keys)


class _Maps(torch.autograd.Function):
    """The pass over all blocks of a layer. Gradients are made on the way; backward at most scales them."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, job: tuple) -> Tensor:
        loss, ours, theirs, mask, factor = job
        dtype = exact(left.dtype)
        total = left.new_zeros((), dtype=dtype)
        gradients = [
            torch.zeros_like(side, dtype=dtype, memory_format=torch.contiguous_format) if wanted else None
            for side, wanted in zip((left, right), ctx.needs_input_grad, strict=False)
        ]
        factor /= left.shape[1]
        with torch.autocast(left.device.type, enabled=False):
            for block in _blocks(ours, mask):
                own_left, own_right, scores = block.scores(ours, dtype)
                target = block.masked(theirs, block.scores(theirs, dtype)[2])
                slope = None if ours.cap is None else 1 - torch.tanh(scores / ours.cap).square_()
                value, gradient = loss.compare(block.masked(ours, scores), target)
                total.add_(value, alpha=factor)
                gradient = gradient.mul_(factor * ours.scale)
                gradient = gradient if slope is None else gradient.mul_(slope)
                if gradients[0] is not None:
                    gradients[0][block.sample, block.heads].index_add_(1, block.queries, gradient @ own_right)
                if gradients[1] is not None:
                    part = gradients[1][block.sample, :, : block.keys]
                    part.index_add_(0, ours.heads_of(block.heads), gradient.mT @ own_left)
        ctx.save_for_backward(
            *(
                each if each is None else each.to(side.dtype)
                for each, side in zip(gradients, (left, right), strict=True)
            )
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(upstream)
        return (*(each if each is None or factor == 1.0 else each * factor for each in ctx.saved_tensors), None)


def map_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`T²·KL(softmax(teacher / T) ‖ softmax(student / T))` of each row; see `MapLoss.compare`.

    The gradient with respect to the student's scores is `T·(p_S - p_T)`.
    """
    log_s, log_t = (torch.log_softmax(scores / temperature, dim=-1) for scores in (student, teacher))
    p_t = log_t.exp()
    rows = student.shape[1]
    value = torch.linalg.vecdot(p_t, log_t.sub_(log_s)).sum() * (temperature**2 / rows)
    return value, log_s.exp_().sub_(p_t).mul_(temperature / rows)
