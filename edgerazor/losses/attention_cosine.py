"""EdgeQAT's distribution guidance: each head's whole attention map points where the teacher's does.

    loss = mean over layers and heads of 1 - cos(flatten A_S, flatten A_T)

Source: EdgeQAT (arXiv 2402.10787, distribution guidance). The authors' code adds `+log Σ cos` to the loss, which
pushes the maps apart, and takes the scores before mask and softmax for the map; this is what their text says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.losses.core.attention_maps import AttentionMapLoss


class AttentionCosine(AttentionMapLoss):
    """`1 - cos` of the flattened maps, mean over layers and heads, then over samples.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
    """

    attention_parts = ("query", "key")

    def value_and_grad(self, student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionMapLoss`. `1 - cos` is half the squared distance of the unit vectors, exactly 0 where equal.

        With `u` the unit vector of the map `a`: the gradient for `a` is `(d - u (u·d)) / |a|`, `d = u_S - u_T`.
        """
        student_map = torch.softmax(student_scores, dim=-1)  # [h, n, keys]
        teacher_map = torch.softmax(teacher_scores, dim=-1)
        norm = _norm(student_map)
        unit = student_map / norm
        difference = unit - teacher_map.div_(_norm(teacher_map))
        value = difference.square().sum() / 2
        gradient = difference.sub_(unit * (unit * difference).sum((1, 2), keepdim=True)).div_(norm)
        # through the softmax
        return value, gradient.sub_(torch.linalg.vecdot(student_map, gradient)[..., None]).mul_(student_map)


def _norm(maps: Tensor) -> Tensor:
    """Euclidean norm of each head's flattened map, `[h, 1, 1]`."""
    return torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True)


LOSS = AttentionCosine
