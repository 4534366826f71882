"""Layer-adaptive feature distillation (LAFD): the student's hidden states are pulled to the teacher's where it matters.

Most layers of a transformer change their input little. The layers that change it most, those whose output has the
lowest cosine similarity with their input, do the most work and lose the most when their weights have few bits.
There the student's hidden states are pulled to the teacher's by mean squared error. Which layers these are is
measured once, by `calibrate`, or anew in each optimizer step, as published. Source: EdgeRazor, arXiv 2605.04062.

Hidden states are those that transformers returns: the output of a layer, for the last layer behind the final norm.
There the norm has made its features comparable, and what is matched is the input of the head.

EdgeRazor's code can also rank layers by the largest norm or variance of their hidden states, or take fixed ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.base import (
    Loss,
    Outputs,
    StepTotals,
    compute_dtype,
    prediction_mask,
    require_teacher,
    sample_weights,
)
from edgerazor.losses.core.layer_selection import (
    METRICS,
    explicit_layers,
    parse_layers_option,
    position_metric,
    resolve_layers,
)

#: Name of the number of pictures' tokens among a step's statistics.
PICTURE_TOKENS = "picture_tokens"


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

    A token's hidden state counts where the token predicts something, as in every other loss. Tokens of pictures predict
    nothing; with `pictures` their states count, too, because later tokens read them.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high. With `select="calibrated"` all
            layers of a list are matched; otherwise it holds the candidates.
        select: "calibrated" chooses once, by the metrics that calibrate measured; "batch" chooses anew in each
            optimizer step, by the teacher's hidden states for its samples.
        count: how many layers are chosen.
        metric: that layers are ranked by: "cosine" (lowest similarity of a layer's output and input, as published),
            "l2" (largest norm) or "variance" (largest variance over positions).
        pictures: match the states of pictures' tokens, too.
    """

    from_recording = "approximate"

    def __init__(
        self,
        layers: str | int | tuple[int | str, ...] = "all",
        select: str = "calibrated",
        count: int = 3,
        metric: str = "cosine",
        pictures: bool = False,
    ) -> None:
        if select not in ("calibrated", "batch"):
            raise usage_error(f"The loss option select is {select!r}; it must be 'calibrated' or 'batch'.")
        if metric not in METRICS:
            raise usage_error(f"The loss option metric is {metric!r}; it must be one of {', '.join(METRICS)}.")
        if type(count) is not int or count < 1:
            raise usage_error(f"The loss option count is {count!r}; it must be an integer of at least 1.")
        self.requested_layers = parse_layers_option(layers)
        self.layers = explicit_layers(self.requested_layers)
        self.select = select
        self.count = count
        self.metric = metric
        if type(pictures) is not bool:
            raise usage_error(f"The loss option pictures is {pictures!r}; it must be true or false.")
        self.pictures = pictures

    def choose_layers(self, layer_count: int, layer_metrics: Mapping[str, Sequence[float]]) -> None:
        """See `Loss`; of all layers, "calibrated" takes those that rank first by the metric."""
        self.layers = resolve_layers(self.requested_layers, layer_count)
        if self.select == "calibrated" and self.requested_layers is None:
            self.layers = self._rank(layer_metrics[self.metric])

    def _rank(self, values: Sequence[float]) -> tuple[int, ...]:
        """The layers that rank first, counted from 1, by the metric's value for each layer."""
        return least_similar([-METRICS[self.metric][1] * value for value in values], self.count)

    def hidden_layers(self) -> tuple[int, ...]:
        """The chosen layers; with "batch" all candidates, and for "cosine" the layers before them."""
        if self.select == "calibrated" or self.metric != "cosine":
            return self.layers
        return tuple(sorted({*self.layers, *(layer - 1 for layer in self.layers)}))

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """For "batch": sum over samples of the mean of each candidate layer's metric. How many tokens pictures take."""
        sums: dict[str, Tensor] = {}
        if self.pictures and teacher.pictures is not None:
            sums[PICTURE_TOKENS] = (teacher.pictures & ~prediction_mask(labels)).sum()
        if self.select == "calibrated":
            return sums
        mask = prediction_mask(labels)
        for layer in self.layers:
            state = _state(teacher, layer)
            previous = _state(teacher, layer - 1) if self.metric == "cosine" else state
            values = position_metric(self.metric, state.detach(), previous.detach(), mask)  # [B, T]
            sums[self._statistic(layer)] = (values * sample_weights(labels, 1, values.dtype)).sum()
        return sums

    def layers_vary_by_step(self) -> bool:
        """See `Loss`."""
        return self.select == "batch"

    def compared_layers(self, totals: StepTotals) -> tuple[int, ...]:
        """See `Loss`: the layers that this step matches."""
        if not self.layers:
            raise ValueError("LAFD has not been told how many layers the model has.")
        if self.select == "calibrated":
            return self.layers
        missing = [layer for layer in self.layers if self._statistic(layer) not in totals.statistics]
        if missing:
            raise ValueError(
                f"The step's statistics lack the {self.metric} of layers {missing}, which LAFD chooses by."
            )
        ranked = self._rank([totals.statistics[self._statistic(layer)] for layer in self.layers])
        return tuple(self.layers[number - 1] for number in ranked)

    def _statistic(self, layer: int) -> str:
        """Name of a layer's metric among the step's statistics."""
        return f"{self.metric}_{layer}"

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`); raises ValueError for missing or different hidden states."""
        teacher = require_teacher(teacher, self)
        mask, tokens = prediction_mask(labels), totals.tokens
        if self.pictures:
            tokens += round(totals.statistics.get(PICTURE_TOKENS, 0.0) * totals.samples)
            mask = mask if teacher.pictures is None else mask | teacher.pictures
        layers = self.compared_layers(totals)
        last = student.last_hidden_state
        total = last.new_zeros((), dtype=compute_dtype(last.dtype))
        for layer in layers:
            state, target = _state(student, layer), _state(teacher, layer)
            if state.shape != target.shape:
                raise ValueError(f"Hidden states of layer {layer}: {tuple(state.shape)} and {tuple(target.shape)}.")
            dtype = compute_dtype(state.dtype)
            difference = state[mask].to(dtype) - target.detach()[mask].to(dtype)  # [tokens, H]
            total = total + difference.square().sum() / state.shape[-1]
        return total / (len(layers) * max(tokens, 1))


def _state(outputs: Outputs, layer: int) -> Tensor:
    """Hidden state of a layer `[B, T, H]`; ValueError where it was not captured."""
    if layer not in outputs.hidden_states:
        raise ValueError(f"The hidden state of layer {layer} is missing; present are {sorted(outputs.hidden_states)}.")
    return outputs.hidden_states[layer]


LOSS = LayerAdaptiveFeatureDistillation
