"""How much text sensitivity is estimated from, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from edgerazor.allocate.measured import candidates_of
from edgerazor.recipe import Calibrate

#: Tokens to estimate from where nobody says how many: at most, on a CPU and on a GPU, and at least.
MOST_TOKENS, MOST_ON_GPU, FEWEST_TOKENS = 1 << 14, 1 << 16, 1 << 11
#: Between these: tokens times weights on a CPU (2,048 tokens of 600 million weights: four minutes of two cores), and
#: how many times that on a GPU.
AFFORDABLE, FASTER = (1 << 11) * 600_000_000, 16


def affordable_tokens(weights: int, device: torch.device) -> int:
    """Number of tokens to analyse a model of so many weights on, where nobody says: minutes on two cores."""
    most, affordable = (MOST_TOKENS, AFFORDABLE) if device.type == "cpu" else (MOST_ON_GPU, FASTER * AFFORDABLE)
    return min(most, max(FEWEST_TOKENS, affordable // weights))


def sequences_of(tokens: int, length: int) -> int:
    """Number of sequences of a length, in tokens, that have at least so many tokens."""
    return max(1, math.ceil(tokens / length))


def forward_passes(estimates: Sequence[str], formats: int, tensors: int, points: int) -> int:
    """Estimated number of forward passes whose time these estimates take.

    Args:
        estimates: their names in a recipe.
        formats: number of candidate formats.
        tensors: number of linear layers.
        points: number of points of integrated gradients.
    """
    passes = {"fisher": 3 + formats, "integrated": 4 * formats * points, "direct": formats * tensors // 2}
    return 6 + sum(passes.get(estimate, 0) for estimate in estimates)


def estimates_of(settings: Calibrate) -> tuple[str, ...]:
    """The estimates of sensitivity to make; that of embedding and head is always `fisher`."""
    chosen = settings.sensitivity
    return ("fisher", "integrated") if chosen == "auto" else tuple(dict.fromkeys(("fisher", chosen)))


def passes_of(settings: Calibrate, linears: int) -> int:
    """Estimated number of forward passes whose time the estimates of a recipe take, for so many linear layers."""
    return forward_passes(estimates_of(settings), len(candidates_of(settings)), linears, settings.sensitivity_points)
