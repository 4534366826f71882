"""AdamW as every part of a training uses it, Adafactor where memory is little; and the learning rate's schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from edgerazor import modules
from edgerazor.recipe import Distill
from edgerazor.training.in_place import InPlaceAdafactor

#: In a group of parameters: its learning rate, as a share of that of the others.
RELATIVE = "relative_rate"


def make_optimizer(module: nn.Module, settings: Distill, learning_rate: float | None = None) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters of a module; weight decay on matrices only, not on their scales.

    Beside the weights that they belong to, scales learn at `scale_rate` of the learning rate: where one moves, all
    weights of its group that lie near the edge of a code change it at once.

    Args:
        module: a student, or one of its layers.
        settings: of the training.
        learning_rate: in the place of the training's own; then it is AdamW.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    scales = {id(matrix.scales) for matrix in modules.fake_quant_weights(module).values()}
    decayed = {id(p) for p in parameters if p.ndim > 1} - scales
    others = [p for p in parameters if id(p) not in decayed]
    slower = {id(p) for p in others} & scales if decayed and settings.scale_rate != 1 else set()
    rate = settings.learning_rate if learning_rate is None else learning_rate
    if settings.optimizer == "adafactor" and learning_rate is None:
        rows = modules.gather_row_gradients(module)
        relative = dict.fromkeys(slower, settings.scale_rate)
        return InPlaceAdafactor(parameters, rate, settings.weight_decay, decayed, rows, relative)
    modules.gather_row_gradients(module, wanted=False)
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if id(p) not in slower], "weight_decay": 0.0},
        {"params": [p for p in others if id(p) in slower], "weight_decay": 0.0, RELATIVE: settings.scale_rate},
    ]
    return torch.optim.AdamW(groups[: 3 if slower else 2], lr=rate, betas=settings.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, for all parameters."""
    if isinstance(optimizer, InPlaceAdafactor):
        optimizer.rate = rate
        return
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RELATIVE, 1.0)


def current_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the latest step."""
    return optimizer.rate if isinstance(optimizer, InPlaceAdafactor) else float(optimizer.param_groups[0]["lr"])


def learning_rate_factor(settings: Distill, share: float) -> float:
    """Learning rate relative to its peak, when `share` (0 to 1) of the budget is used: warm-up, then the schedule."""
    if share < settings.warmup:
        return (share + 1e-3) / (settings.warmup + 1e-3)
    if settings.schedule == "constant":
        return 1.0
    decay_share = (share - settings.warmup) / (1 - settings.warmup)
    decay = 1 - decay_share if settings.schedule == "linear" else cosine_decay(decay_share)
    return settings.final_learning_rate + (1 - settings.final_learning_rate) * decay


def cosine_decay(share: float) -> float:
    """Half a cosine, from 1 at share 0 to 0 at share 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
