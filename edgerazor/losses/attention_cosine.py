"""EdgeQAT's distribution guidance: each head's whole attention map points where the teacher's does.

    loss = mean over layers and heads of 1 - cos(flatten A_S, flatten A_T)

Source: EdgeQAT (arXiv 2402.10787, distribution guidance). The authors' code adds `+log Σ cos` to the loss, which
pushes the maps apart, and takes the scores before mask and softmax for the map; this is what their text says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.losses.core.maps import MapLoss


class AttentionCosine(MapLoss):
    """`1 - cos` of the flattened maps, mean over layers and heads, then over samples.

    Args:
        layers: "all", or a list of layers, counted from 1 or called low (1), mid, high (or last).
    """

    attention_parts = ("query", "key")

    def compare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See `MapLoss`. `1 - cos` is half the squared distance of the directions, which is exactly 0 where they agree.

        With `u` the direction of the map `a`: gradient for `a` is `(d - u (u·d)) / |a|`, `d = u_S - u_T`.
        """
        ours, theirs = torch.softmax(student, dim=-1), torch.softmax(teacher, dim=-1)  # [h, n, keys]
        length = _length(ours)
        direction = ours / length
        away = direction - theirs.div_(_length(theirs))
        value = away.square().sum() / 2
        gradient = away.sub_(direction * (direction * away).sum((1, 2), keepdim=True)).div_(length)
        return value, gradient.sub_(torch.linalg.vecdot(ours, gradient)[..., None]).mul_(ours)


def _length(maps: Tensor) -> Tensor:
    """Euclidean length of each head's map, `[h, 1, 1]`."""
    return torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True)


LOSS = AttentionCosine
