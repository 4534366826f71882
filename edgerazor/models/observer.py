"""What a layer-by-layer pass tells those who gather statistics from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Observer:
    """Gathers statistics during a pass; its methods do nothing but where a subclass defines them.

    Tensors are on the compute device and in the compute dtype, and must not be changed. `n` positions of a micro-batch
    count; batches come in their order, and layers in the order of the pass.
    """

    def layer(self, index: int, inputs: Tensor, outputs: Tensor, counts: Tensor) -> None:
        """Forward pass, behind each layer (from 0) and batch: states [B, T, H] twice; counts bool [B, T]."""

    def linear(self, path: str, x: Tensor, weights: Tensor | None = None) -> None:
        """Forward pass, for each linear layer and batch, as it is called: its path in the model, its input [n, in]. Of
        an expert only the positions that are routed to it, and their weights [n]: what its output is multiplied with.
        An expert that no position is routed to is not called."""

    def final(self, x: Tensor) -> None:
        """Forward pass, at the end, for each batch: the input of the head, [n, H]."""

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        """Backward pass, for each linear layer and batch: its weight [out, in], its input x [B·T, in], and the gradient
        g [B·T, out] with respect to its output (bias included), as it follows from `upstream`: nothing is averaged. All
        positions are there, since those that count may attend to those that do not; of padding g is zero. Of an expert
        only those that are routed to it are there, and g holds their weights."""

    def state(self) -> dict[str, Tensor]:
        """All that was gathered, to be stored: tensors of any dtype, under names that the pass does not interpret."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, in a new process."""

    def combined(self, states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The state that one process would have gathered, of those of several, each of which had a part of the batches,
        in their order. Here all that is gathered are sums."""
        names = {name: None for state in states for name in state}
        return {name: torch.stack([state[name] for state in states if name in state]).sum(0) for name in names}

    def identity(self) -> str:
        """What decides the statistics besides the pass and the class; a `state` of another identity is not restored."""
        return ""
