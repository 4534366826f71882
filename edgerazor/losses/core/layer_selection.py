"""Which decoder layers a loss compares, and the metrics that layers may be ranked by.

Layers are numbers counted from 1, or names that the model's depth turns into numbers. Metrics rank layers by the
hidden states that enter and leave them; their source is the code of EdgeRazor (arXiv 2605.04062).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgerazor.errors import usage_error
from edgerazor.losses.core.base import compute_dtype

#: name -> number of the layer, for the number of layers (EdgeRazor's fixed choices are the first three).
NAMED_LAYERS: dict[str, Callable[[int], int]] = {
    "low": lambda layer_count: 1,
    "mid": lambda layer_count: (layer_count + 1) // 2,
    "high": lambda layer_count: layer_count,
    "last": lambda layer_count: layer_count,
}

Layers = tuple[int | str, ...]


def parse_layers_option(layers: object) -> Layers | None:
    """A recipe's `layers`: "all" gives None; a number, a name or a list of them gives a tuple.

    Raises:
        UserError: it is something else.
    """
    if layers == "all":
        return None
    entries = tuple(layers) if isinstance(layers, tuple | list) else (layers,)
    if not entries or not all(map(_is_layer, entries)):
        raise usage_error(
            f"The loss option layers is {layers!r}; it must be 'all' or a list of layers, counted from 1 or called "
            f"{', '.join(NAMED_LAYERS)}."
        )
    return entries


def resolve_layers(layers: Layers | None, layer_count: int) -> tuple[int, ...]:
    """Layer numbers, ascending, in a model with this many layers; None means all of them."""
    if layers is None:
        return tuple(range(1, layer_count + 1))
    return tuple(sorted({NAMED_LAYERS[layer](layer_count) if isinstance(layer, str) else layer for layer in layers}))


def explicit_layers(layers: Layers | None) -> tuple[int, ...]:
    """The layer numbers, where they do not depend on the model's depth; empty where they do."""
    if layers is None or any(isinstance(layer, str) for layer in layers):
        return ()
    return resolve_layers(layers, 0)


def _is_layer(entry: object) -> bool:
    return entry in NAMED_LAYERS if isinstance(entry, str) else type(entry) is int and entry > 0


# --- metrics ------------------------------------------------------------------------------------


def cosine(state: Tensor, previous: Tensor, _mask: Tensor) -> Tensor:
    """Cosine similarity of two hidden states position by position: `[B, T, H]`, `[B, T, H]` -> `[B, T]`."""
    return torch.cosine_similarity(state, previous, dim=-1)


def norm(state: Tensor, _previous: Tensor, _mask: Tensor) -> Tensor:
    """Euclidean length of a hidden state at each position: `[B, T, H]` -> `[B, T]`."""
    return torch.linalg.vector_norm(state, dim=-1)


def variance(state: Tensor, _previous: Tensor, mask: Tensor) -> Tensor:
    """Variance over the positions of a sample, one value for all of them: `[B, T, H]` -> `[B, T]`.

    The mean over features of the unbiased variance over positions; 0 where a sample has one position.
    """
    weights = mask.to(state.dtype)[..., None]  # [B, T, 1]
    count = weights.sum(1, keepdim=True)  # [B, 1, 1]
    mean = (state * weights).sum(1, keepdim=True) / count.clamp(min=1)
    deviation = (state - mean) * weights
    feature_variance = deviation.square().sum(1) / (count[:, 0] - 1).clamp(min=1)  # [B, H]
    return feature_variance.mean(1, keepdim=True).expand(mask.shape)


#: metric -> its function of a layer's output, its input and the mask of positions that count; +1 where the layers with
#: the largest values are chosen, -1 where those with the smallest are.
METRICS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "cosine": (cosine, -1),
    "l2": (norm, 1),
    "variance": (variance, 1),
}


def position_metric(metric: str, state: Tensor, previous: Tensor, mask: Tensor) -> Tensor:
    """One of `METRICS` at every position, `[B, T]`, float32 (float64 for float64 states).

    Args:
        metric: its name.
        state: `[B, T, H]`, the layer's output.
        previous: `[B, T, H]`, its input.
        mask: `[B, T]` bool, the positions that count.
    """
    dtype = compute_dtype(state.dtype)
    return METRICS[metric][0](state.to(dtype), previous.to(dtype), mask)


def layer_metric(metric: str, hidden: dict[int, Tensor], mask: Tensor) -> Tensor:
    """One of `METRICS` for all layers of a model.

    Args:
        metric: its name.
        hidden: layer -> `[B, T, H]` for each of 0 (the embedding's output), 1, ... L.
        mask: `[B, T]`, nonzero at the positions that count (all but padding).

    Returns:
        `[L]` float32: the mean over the positions that count, of layer `l` at index `l - 1`.

    Raises:
        ValueError: a layer is missing, or no position counts.
    """
    depth = len(hidden) - 1
    if depth < 1 or sorted(hidden) != list(range(depth + 1)):
        raise ValueError(f"Hidden states of layers {sorted(hidden)} were given; needed are all from 0 to the last.")
    counts = mask.bool()
    if not counts.any():
        raise ValueError("No position counts, so there is nothing to measure.")
    values = (position_metric(metric, hidden[layer], hidden[layer - 1], counts) for layer in range(1, depth + 1))
    return torch.stack([value[counts].mean() for value in values])
