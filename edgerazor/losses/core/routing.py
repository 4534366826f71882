"""What losses of routers share: the routers of a mixture of experts, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from edgerazor.losses.core.base import Loss, Outputs, Routing, compute_dtype


class RouterLoss(Loss):
    """A mean over the layers that have a router. Logits are compared in float32 (float64 where they are that)."""

    needs_routing: ClassVar[bool] = True

    def routings(self, outputs: Outputs) -> list[tuple[int, Routing]]:
        """Layer, counted from 1, and routing of each layer that has a router, ascending.

        Raises:
            ValueError: no routing was captured.
        """
        if not outputs.routing:
            raise ValueError(f"{type(self).__name__} looks at routers, and no routing was given.")
        return sorted(outputs.routing.items(), key=lambda item: item[0])

    def logits(self, outputs: Outputs) -> Iterator[tuple[int, Tensor]]:
        """Layer and logits `[B, T, experts]` of its router, in the dtype that losses are computed in."""
        for layer, routing in self.routings(outputs):
            yield layer, routing.logits.to(compute_dtype(routing.logits.dtype))
