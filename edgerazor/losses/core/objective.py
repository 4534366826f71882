"""Losses by their names, and the weighted sum of several."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edgerazor import registry
from edgerazor.errors import usage_error
from edgerazor.losses.core.base import Loss, Outputs, StepTotals
from edgerazor.losses.core.logit_losses import LogitLoss, total_logit_loss


def names() -> list[str]:
    """Names of the losses, sorted."""
    return registry.names("losses")


def make(name: str, **options: Any) -> Loss:
    """The loss called `name` with a recipe's options for it.

    Raises:
        UserError: there is no such loss, it has no such option, or an option's value makes no sense.
    """
    loss_class = registry.find("losses", name, "LOSS")
    known = list(inspect.signature(loss_class).parameters)
    for option in options:
        if option not in known:
            what = f"its options are {', '.join(known)}" if known else "it has none"
            raise usage_error(f"The loss {name!r} has no option called {option!r}; {what}.")
    loss: Loss = loss_class(**options)
    return loss


def total_loss(
    terms: Sequence[tuple[float, Loss]],
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    totals: StepTotals,
) -> Tensor:
    """`Σ weight·loss`, a scalar: a micro-batch's contribution to the loss of the step (see `Loss`).

    Args:
        terms: (weight, loss). All losses of next-token distributions share one pass over chunks of positions.
        student: the gradient flows into its tensors and its head.
        teacher: None where no loss needs it.
        labels: `[B, T]` int64, -100 where masked.
        totals: counts and statistics of the whole step.

    Raises:
        ValueError: an input that a loss needs is missing, or shapes do not agree.
    """
    logit_terms = [(weight, loss) for weight, loss in terms if isinstance(loss, LogitLoss)]
    other_terms = [(weight, loss) for weight, loss in terms if not isinstance(loss, LogitLoss)]
    parts = [weight * loss(student, teacher, labels, totals) for weight, loss in other_terms]
    if logit_terms:
        parts.append(total_logit_loss(logit_terms, student, teacher, labels, totals))
    return sum(parts[1:], parts[0])
