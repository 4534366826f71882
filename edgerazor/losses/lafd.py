"""Layer-adaptive feature distillation (LAFD): the student's hidden states are pulled to the teacher's where it matters.

Most layers of a transformer change their input little. The layers that change it most, those whose output has the
lowest cosine similarity with their input, do the most work and lose the most when their weights become coarse.
There the student's hidden states are pulled to the teacher's by mean squared error. Which layers these are is
measured once, by `calibrate`, or anew in each optimizer step, as published. Source: EdgeRazor, arXiv 2605.04062.

Its code can also rank layers by the largest norm of their hidden states or by the largest variance, or take fixed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses._base import Loss, Outputs, StepTotals, exact, predicting, require_teacher, sample_weights
from edgerazor.losses._layers import fixed, layers_option, numbered


def cosine(state: Tensor, previous: Tensor, _mask: Tensor) -> Tensor:
    """Cosine similarity of two hidden states position by position: `[B, T, H]`, `[B, T, H]` -> `[B, T]`."""
    return torch.cosine_similarity(state, previous, dim=-1)


def norm(state: Tensor, _previous: Tensor, _mask: Tensor) -> Tensor:
    """Euclidean length of a hidden state at each position: `[B, T, H]` -> `[B, T]`."""
    return torch.linalg.vector_norm(state, dim=-1)


def variance(state: Tensor, _previous: Tensor, mask: Tensor) -> Tensor:
    """How much the features vary over the positions of a sample, the same at all of them: `[B, T, H]` -> `[B, T]`.

    The mean over features of the unbiased variance over positions; 0 where a sample has one position.
    """
    keep = mask.to(state.dtype)[..., None]  # [B, T, 1]
    count = keep.sum(1, keepdim=True)  # [B, 1, 1]
    away = (state - (state * keep).sum(1, keepdim=True) / count.clamp(min=1)) * keep
    found = away.square().sum(1) / (count[:, 0] - 1).clamp(min=1)  # [B, H]
    return found.mean(1, keepdim=True).expand(mask.shape)


#: metric -> what it measures of a layer's output, its input and the mask of what counts; +1 where the largest layers
#: are chosen, -1 where the smallest are.
METRICS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "cosine": (cosine, -1),
    "l2": (norm, 1),
    "variance": (variance, 1),
}


def measure(metric: str, state: Tensor, previous: Tensor, mask: Tensor) -> Tensor:
    """One of `METRICS` at every position, `[B, T]`, float32 (float64 for float64 states).

    Args:
        metric: its name.
        state: `[B, T, H]`, the layer's output.
        previous: `[B, T, H]`, its input.
        mask: `[B, T]` bool, the positions that count.
    """
    dtype = exact(state.dtype)
    return METRICS[metric][0](state.to(dtype), previous.to(dtype), mask)


def layer_metric(metric: str, hidden: dict[int, Tensor], mask: Tensor) -> Tensor:
    """One of `METRICS` for all layers of a model.

    Args:
        metric: its name.
        hidden: layer -> `[B, T, H]` for all of 0 (the embedding's output), 1, ... L.
        mask: `[B, T]`, nonzero at the positions that count (all but padding).

    Returns:
        `[L]` float32: the mean over the positions that count, of layer `l` at index `l - 1`.

    Raises:
        ValueError: a layer is missing, or no position counts.
    """
    depth = len(hidden) - 1
    if depth < 1 or sorted(hidden) != list(range(depth + 1)):
        raise ValueError(f"Hidden states of layers {sorted(hidden)} were given; needed are all from 0 to the last.")
    keep = mask.bool()
    if not keep.any():
        raise ValueError("No position counts, so there is nothing to measure.")
    found = (measure(metric, hidden[layer], hidden[layer - 1], keep) for layer in range(1, depth + 1))
    return torch.stack([each[keep].mean() for each in found])


def layer_similarity(hidden: dict[int, Tensor], mask: Tensor) -> Tensor:
    """`layer_metric` "cosine": how alike each layer's output and input are, `[L]` float32."""
    return layer_metric("cosine", hidden, mask)


def least_similar(similarities: Sequence[float], k: int) -> tuple[int, ...]:
    """The `k` layers that change their input most.

    Args:
        similarities: similarity of each layer's output and input; index 0 belongs to layer 1.
        k: how many, at least 1; a model with fewer layers gives all of them.

    Returns:
        layer numbers counted from 1, ascending; of equal similarities the earlier layer is taken.

    Raises:
        ValueError: `k` is less than 1, there are no similarities, or one is not finite.
    """
    if k < 1 or not similarities:
        raise ValueError(f"Asked for {k} of {len(similarities)} layers; both must be at least 1.")
    if not all(math.isfinite(value) for value in similarities):
        raise ValueError(f"A layer's similarity is not finite: {list(similarities)}.")
    ranked = sorted(range(len(similarities)), key=lambda index: similarities[index])
    return tuple(sorted(index + 1 for index in ranked[:k]))


class LayerAdaptiveFeatureDistillation(Loss):
    """Mean squared error of hidden states, averaged over the step's tokens, the chosen layers and the features.

    A token's hidden state counts where the token predicts something, as in every other loss.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high. A list with
            `select="calibrated"` is matched as it is; otherwise it holds the candidates.
        select: "calibrated" chooses once, by what calibrate measured; "batch" anew in each optimizer step, by the
            teacher's hidden states for its samples.
        count: how many layers are chosen.
        metric: by what: "cosine" (lowest similarity of a layer's output and input, as published), "l2" (largest norm)
            or "variance" (largest variance over positions).
    """

    def __init__(
        self,
        layers: str | int | tuple[int | str, ...] = "all",
        select: str = "calibrated",
        count: int = 3,
        metric: str = "cosine",
    ) -> None:
        if select not in ("calibrated", "batch"):
            raise usage_error(f"The loss option select is {select!r}; it must be 'calibrated' or 'batch'.")
        if metric not in METRICS:
            raise usage_error(f"The loss option metric is {metric!r}; it must be one of {', '.join(METRICS)}.")
        if type(count) is not int or count < 1:
            raise usage_error(f"The loss option count is {count!r}; it must be an integer of at least 1.")
        self.wanted = layers_option(layers)
        self.layers = fixed(self.wanted)
        self.select = select
        self.count = count
        self.metric = metric

    def choose_layers(self, count: int, measured: Mapping[str, Sequence[float]]) -> None:
        """See `Loss`; of all layers, "calibrated" takes those with the most remarkable measurements."""
        self.layers = numbered(self.wanted, count)
        if self.select == "calibrated" and self.wanted is None:
            self.layers = self._most(measured[self.metric])

    def _most(self, values: Sequence[float]) -> tuple[int, ...]:
        """The layers to match, counted from 1, by the metric's value for each layer."""
        return least_similar([-METRICS[self.metric][1] * value for value in values], self.count)

    def hidden_layers(self) -> tuple[int, ...]:
        """The chosen layers; with "batch" all candidates, and for "cosine" the layers before them."""
        if self.select == "calibrated" or self.metric != "cosine":
            return self.layers
        return tuple(sorted({*self.layers, *(layer - 1 for layer in self.layers)}))

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """For "batch": sum over samples of the mean of each candidate layer's metric."""
        if self.select == "calibrated":
            return {}
        sums, mask = {}, predicting(labels)
        for layer in self.layers:
            state = _state(teacher, layer)
            previous = _state(teacher, layer - 1) if self.metric == "cosine" else state
            found = measure(self.metric, state.detach(), previous.detach(), mask)  # [B, T]
            sums[self._statistic(layer)] = (found * sample_weights(labels, 1, found.dtype)).sum()
        return sums

    def chosen(self, totals: StepTotals) -> tuple[int, ...]:
        """The layers that this step matches."""
        if not self.layers:
            raise ValueError("LAFD has not been told how many layers the model has.")
        if self.select == "calibrated":
            return self.layers
        missing = [layer for layer in self.layers if self._statistic(layer) not in totals.statistics]
        if missing:
            raise ValueError(
                f"The step's statistics lack the {self.metric} of layers {missing}, which LAFD chooses by."
            )
        picks = self._most([totals.statistics[self._statistic(layer)] for layer in self.layers])
        return tuple(self.layers[pick - 1] for pick in picks)

    def _statistic(self, layer: int) -> str:
        """Name of a layer's metric among the step's statistics."""
        return f"{self.metric}_{layer}"

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); raises ValueError for missing or different hidden states."""
        teacher = require_teacher(teacher, self)
        mask = predicting(labels)
        layers = self.chosen(totals)
        total = student.states.new_zeros((), dtype=exact(student.states.dtype))
        for layer in layers:
            ours, theirs = _state(student, layer), _state(teacher, layer)
            if ours.shape != theirs.shape:
                raise ValueError(f"Hidden states of layer {layer}: {tuple(ours.shape)} and {tuple(theirs.shape)}.")
            dtype = exact(ours.dtype)
            difference = ours[mask].to(dtype) - theirs.detach()[mask].to(dtype)  # [tokens, H]
            total = total + difference.square().sum() / ours.shape[-1]
        return total / (len(layers) * max(totals.tokens, 1))


def _state(outputs: Outputs, layer: int) -> Tensor:
    """Hidden state of a layer `[B, T, H]`; ValueError where the model was not asked for it."""
    if layer not in outputs.hidden:
        raise ValueError(f"The hidden state of layer {layer} is missing; present are {sorted(outputs.hidden)}.")
    return outputs.hidden[layer]


LOSS = LayerAdaptiveFeatureDistillation
