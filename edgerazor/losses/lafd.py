"""Layer-adaptive feature distillation (LAFD): the student's hidden states are pulled to the teacher's where it matters.

Most layers of a transformer change their input little. The layers that change it most, those whose output has the
lowest cosine similarity with their input, do the most work and lose the most when their weights become coarse.
There the student's hidden states are pulled to the teacher's by mean squared error. Which layers these are is
measured once, by `calibrate`, or anew in each optimizer step, as published. Source: EdgeRazor, arXiv 2605.04062.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses._base import Loss, Outputs, StepTotals, exact, predicting, require_teacher, sample_weights


def cosine(state: Tensor, previous: Tensor) -> Tensor:
    """Cosine similarity of two hidden states position by position: `[B, T, H]`, `[B, T, H]` -> `[B, T]` float32."""
    dtype = exact(state.dtype)
    return torch.cosine_similarity(state.to(dtype), previous.to(dtype), dim=-1)


def layer_similarity(hidden: dict[int, Tensor], mask: Tensor) -> Tensor:
    """How alike each layer's output and input are.

    Args:
        hidden: layer -> `[B, T, H]` for all of 0 (the embedding's output), 1, ... L.
        mask: `[B, T]`, nonzero at the positions that count (all but padding).

    Returns:
        `[L]` float32: mean cosine similarity of `hidden[l]` and `hidden[l - 1]` at index `l - 1`.

    Raises:
        ValueError: a layer is missing, or no position counts.
    """
    depth = len(hidden) - 1
    if depth < 1 or sorted(hidden) != list(range(depth + 1)):
        raise ValueError(f"Hidden states of layers {sorted(hidden)} were given; needed are all from 0 to the last.")
    keep = mask.bool()
    if not keep.any():
        raise ValueError("No position counts, so there is no similarity to measure.")
    return torch.stack([cosine(hidden[layer], hidden[layer - 1])[keep].mean() for layer in range(1, depth + 1)])


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
        layers: layer numbers, counted from 1. With `select="calibrated"` these are the layers to match, with
            `select="batch"` the candidates (all layers, as published).
        select: "calibrated" matches `layers`; "batch" matches the `count` of them whose teacher hidden states
            change most over the optimizer step's samples.
        count: how many layers "batch" chooses.
    """

    def __init__(self, layers: tuple[int, ...] = (), select: str = "calibrated", count: int = 3) -> None:
        if select not in ("calibrated", "batch"):
            raise usage_error(f"The loss option select is {select!r}; it must be 'calibrated' or 'batch'.")
        numbers = isinstance(layers, tuple | list) and all(type(layer) is int and layer > 0 for layer in layers)
        if not layers or not numbers:
            raise usage_error(f"The loss option layers is {layers!r}; it must be a list of layers, counted from 1.")
        if type(count) is not int or count < 1:
            raise usage_error(f"The loss option count is {count!r}; it must be an integer of at least 1.")
        self.layers = tuple(sorted(set(layers)))
        self.select = select
        self.count = count

    def hidden_layers(self) -> tuple[int, ...]:
        """The chosen layers; with "batch" all candidates and the layers before them."""
        if self.select == "calibrated":
            return self.layers
        return tuple(sorted({*self.layers, *(layer - 1 for layer in self.layers)}))

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """For "batch": sum over samples of each candidate layer's mean similarity with the layer before it."""
        if self.select == "calibrated":
            return {}
        sums = {}
        for layer in self.layers:
            alike = cosine(_state(teacher, layer), _state(teacher, layer - 1))  # [B, T]
            sums[_statistic(layer)] = (alike.detach() * sample_weights(labels, 1, alike.dtype)).sum()
        return sums

    def chosen(self, totals: StepTotals) -> tuple[int, ...]:
        """The layers that this step matches."""
        if self.select == "calibrated":
            return self.layers
        missing = [layer for layer in self.layers if _statistic(layer) not in totals.statistics]
        if missing:
            raise ValueError(f"The step's statistics lack the similarity of layers {missing}, which LAFD chooses by.")
        picks = least_similar([totals.statistics[_statistic(layer)] for layer in self.layers], self.count)
        return tuple(self.layers[pick - 1] for pick in picks)

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


def _statistic(layer: int) -> str:
    """Name of a layer's similarity among the step's statistics."""
    return f"similarity_{layer}"


def _state(outputs: Outputs, layer: int) -> Tensor:
    """Hidden state of a layer `[B, T, H]`; ValueError where the model was not asked for it."""
    if layer not in outputs.hidden:
        raise ValueError(f"The hidden state of layer {layer} is missing; present are {sorted(outputs.hidden)}.")
    return outputs.hidden[layer]


LOSS = LayerAdaptiveFeatureDistillation
