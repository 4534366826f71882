"""An optimizer whose memory is next to nothing: factored second moments, and each weight changed in the backward pass.

Adafactor (Shazeer and Stern, arXiv 1804.04235) keeps of the squared gradients of a matrix [rows, columns] the means of
its rows and columns alone, and no mean of the gradients. As soon as the backward pass knows the gradient of a weight,
the weight takes its step and the gradient is freed, so that there is one at a time instead of all. The step is computed
in the gradient's own memory: of a large vocabulary's head, a copy is 600 MB.

The norm of all gradients is then not known in time. Adafactor clips each weight's step by its own root mean square
instead (its `d`), and a gradient that is not finite changes no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgerazor import modules

#: Least root mean square of a weight that its steps are relative to.
LEAST_SIZE = 1e-3
#: The means of squared gradients forget like `1 - step^BETA2_DECAY` (of the paper, and of torch's Adafactor).
BETA2_DECAY = -0.8
#: Weights of a matrix whose step is computed at a time.
BLOCK_ELEMENTS = 1 << 22


class InPlaceAdafactor(torch.optim.Optimizer):
    """Adafactor whose steps happen inside `backward`, if it is the only one before `step`.

    Adafactor's learning rate is relative to the size of a weight. Here it is AdamW's, and both change a weight by about
    the learning rate in a step.

    Args:
        parameters: that require gradients.
        learning_rate: as AdamW's.
        weight_decay: of those in `decayed`.
        decayed: ids of parameters.
        rows: id of a parameter -> gradients of some of its rows, to be added to its own (`gather_row_gradients`).
        relative: id of a parameter -> its learning rate as a share of that of the others.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        decayed: set[int],
        rows: Mapping[int, modules.RowGradients] | None = None,
        relative: Mapping[int, float] | None = None,
    ) -> None:
        self.rate, self.decay = learning_rate, weight_decay
        super().__init__([{"params": list(parameters)}], {"lr": learning_rate})
        self.active = False
        self.not_finite = False
        self._decayed, self._rows, self._relative = decayed, rows or {}, relative or {}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in parameters]

    def before_backward(self, active: bool) -> None:
        """Before a backward pass: whether weights change in it, or gradients are added up for the next one."""
        self.active, self.not_finite = active, False

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        if not self.active or parameter.grad is None:
            return
        gradient, parameter.grad = parameter.grad, None
        rows = self._rows.get(id(parameter), [])
        while rows:
            gradient.index_add_(0, *rows.pop())
        if not bool(gradient.sum().isfinite()):
            self.not_finite = True
            return
        size = max(float(torch.linalg.vector_norm(parameter)) / parameter.numel() ** 0.5, LEAST_SIZE)
        moments = self._moments(parameter)
        moments["step"] += 1
        step = float(moments["step"])
        rate = min(self.rate * self._relative.get(id(parameter), 1.0), size / step**0.5)
        if id(parameter) in self._decayed and self.decay:
            parameter.mul_(1 - self.rate * self.decay)
        direction_(gradient, moments, step**BETA2_DECAY)
        clipped = max(1.0, float(torch.linalg.vector_norm(gradient)) / gradient.numel() ** 0.5)
        parameter.add_(gradient, alpha=-rate / clipped)

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Of a weight: its step, and `row_var [..., rows, 1]` and `col_var [..., 1, columns]` or `variance [n]`."""
        moments: dict[str, Tensor] = self.state[parameter]
        if not moments:
            moments["step"] = torch.zeros(())
            if parameter.ndim > 1:
                moments["row_var"] = parameter.new_zeros((*parameter.shape[:-1], 1))
                moments["col_var"] = parameter.new_zeros((*parameter.shape[:-2], 1, parameter.shape[-1]))
            else:
                moments["variance"] = torch.zeros_like(parameter)
        return moments

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that no step was taken with."""
        super().zero_grad(set_to_none)
        for rows in self._rows.values():
            rows.clear()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing is left to do behind the backward pass."""

    def remove_hooks(self) -> None:
        """Let go of the parameters, so that another optimizer can take them."""
        for hook in self._hooks:
            hook.remove()


def direction_(gradient: Tensor, moments: dict[str, Tensor], new: float) -> None:
    """Overwrite a gradient by the direction of its step, `gradient / sqrt(variance)`, and bring the moments up to date.

    Args:
        gradient: float32 [...].
        moments: see `InPlaceAdafactor`.
        new: how much of the moments is of this gradient, 0 to 1.
    """
    least = torch.finfo(gradient.dtype).eps
    if gradient.ndim < 2:
        variance = moments["variance"].lerp_(gradient.square(), new)
        gradient.mul_(variance.clamp(min=least**2).rsqrt_())
        return
    rows, columns = moments["row_var"], moments["col_var"]
    rows.lerp_(torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).square_() / gradient.shape[-1], new)
    columns.lerp_(torch.linalg.vector_norm(gradient, dim=-2, keepdim=True).square_() / gradient.shape[-2], new)
    relative = rows / rows.mean(-2, keepdim=True).clamp_(min=least)
    height = max(1, BLOCK_ELEMENTS * gradient.shape[-2] // gradient.numel())
    for part, of_rows in zip(gradient.split(height, -2), relative.split(height, -2), strict=True):
        part.mul_((of_rows * columns).clamp_(min=least**2).rsqrt_())
