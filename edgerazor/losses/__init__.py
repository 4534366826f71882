"""What the student is asked to match. Each file here whose name has no underscore is a loss, called by its file's name.

Read `_base.py` first (what a loss sees and gives back), then `ce.py` (the shortest) and `eakld.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

from edgerazor import registry
from edgerazor.errors import usage_error
from edgerazor.losses._base import MASKED, Loss, Outputs, StepTotals, predicting, step_counts
from edgerazor.losses._kl import common_vocabulary

__all__ = [
    "MASKED",
    "Loss",
    "Outputs",
    "StepTotals",
    "common_vocabulary",
    "make",
    "names",
    "predicting",
    "step_counts",
]


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
