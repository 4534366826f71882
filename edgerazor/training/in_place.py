"""An optimizer whose memory is next to nothing: factored second moments, and each weight changed in the backward pass.

Adafactor (Shazeer and Stern, arXiv 1804.04235) keeps of the squared gradients of a matrix [rows, columns] the means of
its rows and columns alone, and no mean of the gradients. As soon as the backward pass knows the gradient of a weight,
the weight takes its step and the gradient is freed, so that there is one at a time instead of all.

The norm of all gradients is then not known in time. Adafactor clips each weight's step by its own root mean square
instead (its `d`), and a gradient that is not finite changes no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Least root mean square of a weight that its steps are relative to.
LEAST_SIZE = 1e-3


class InPlaceAdafactor(torch.optim.Adafactor):
    """Adafactor whose steps happen inside `backward`, if it is the only one before `step`.

    Adafactor's learning rate is relative to the size of a weight, so it is given AdamW's, divided by that size: both
    change a weight by about the learning rate in a step.

    Args:
        parameters: that require gradients.
        learning_rate: as AdamW's.
        weight_decay: of those in `decayed`.
        decayed: ids of parameters.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float, decayed: set[int]
    ) -> None:
        self.rate, self.decay = learning_rate, weight_decay
        groups = [{"params": [parameter], "decayed": id(parameter) in decayed} for parameter in parameters]
        super().__init__(groups, lr=learning_rate)
        self.active = False
        self.not_finite = False
        self._groups = {id(group["params"][0]): group for group in self.param_groups}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in parameters]

    def before_backward(self, active: bool) -> None:
        """Before a backward pass: whether weights change in it, or gradients are added up for the next one."""
        self.active, self.not_finite = active, False

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        if not self.active or parameter.grad is None:
            return
        if not bool(parameter.grad.sum().isfinite()):
            self.not_finite = True
        else:
            group = self._groups[id(parameter)]
            size = max(float(torch.linalg.vector_norm(parameter)) / parameter.numel() ** 0.5, LEAST_SIZE)
            # torch multiplies `lr` with the weight's size again, but not where it decays
            group["lr"], group["weight_decay"] = self.rate / size, self.decay * size if group["decayed"] else 0.0
            whole, self.param_groups = self.param_groups, [group]
            try:
                super().step()
            finally:
                self.param_groups = whole
        parameter.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing is left to do behind the backward pass."""

    def remove_hooks(self) -> None:
        """Let go of the parameters, so that another optimizer can take them."""
        for hook in self._hooks:
            hook.remove()
