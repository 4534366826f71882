"""What to do about a step whose loss or gradient cannot be right: skip it, lower the rate, and stop where it goes on.

A loss that is not finite, or far above those before it, comes from a batch or a learning rate that the student cannot
take. Its gradient would spoil master weights and moments for good, so the step is left out: the weights stay as they
are, and the training goes on with the next sequences at half the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: A loss above so many times the largest of the losses before it is a spike.
SPIKE = 4.0
#: How many losses before it are looked at, and how many there have to be.
LOOKED_AT, LEAST = 32, 16
#: What the learning rate is multiplied with when a step is skipped.
LOWER = 0.5
#: Steps that are skipped one after the other until the training stops.
MOST_SKIPPED = 3


def problem(loss: float, gradient_norm: float, earlier: Sequence[float]) -> str:
    """Why a step is not to be taken, in words; empty where it is.

    Args:
        loss: of the step, over all processes.
        gradient_norm: of the step, over all processes.
        earlier: the losses of the latest steps that were taken.
    """
    if not math.isfinite(loss):
        return "its loss is not finite"
    if not math.isfinite(gradient_norm):
        return "its gradient is not finite"
    if len(earlier) >= LEAST and 0 < SPIKE * max(earlier) < loss:
        return f"its loss of {loss:.4g} is more than {SPIKE:g} times the largest of the {len(earlier)} steps before it"
    return ""
