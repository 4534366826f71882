"""AdamW as every part of a training uses it, and how its learning rate changes."""

from __future__ import annotations

import math

import torch
from torch import nn

from edgerazor import modules
from edgerazor.recipe import Distill


def make_optimizer(module: nn.Module, settings: Distill, learning_rate: float | None = None) -> torch.optim.Optimizer:
    """AdamW for what is trained inside a module; weight decay on matrices only, not on their scales.

    Args:
        module: a student, or one of its layers.
        settings: of the training.
        learning_rate: another one than that of the training.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    scales = {id(matrix.scales) for matrix in modules.fake_quant_weights(module).values()}
    decaying = {id(p) for p in parameters if p.ndim > 1} - scales
    groups = [
        {"params": [p for p in parameters if id(p) in decaying], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    rate = settings.learning_rate if learning_rate is None else learning_rate
    return torch.optim.AdamW(groups, lr=rate, betas=settings.betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def schedule(settings: Distill, share: float) -> float:
    """Learning rate as a share of its peak, when `share` of the budget is used."""
    if share < settings.warmup:
        return (share + 1e-3) / (settings.warmup + 1e-3)
    if settings.schedule == "constant":
        return 1.0
    rest = (share - settings.warmup) / (1 - settings.warmup)
    fall = 1 - rest if settings.schedule == "linear" else falling(rest)
    return settings.final_learning_rate + (1 - settings.final_learning_rate) * fall


def falling(share: float) -> float:
    """Half a cosine, from 1 at share 0 to 0 at share 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
