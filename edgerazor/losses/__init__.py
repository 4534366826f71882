"""What the student is asked to match. Each file of this folder is a loss, called by its file's name.

Read `core/base.py` first (what a loss is given and returns), then `ce.py` (the shortest loss) and `eakld.py`.
"""

from edgerazor.losses.core.base import (
    MASKED,
    Attention,
    Head,
    Loss,
    Outputs,
    Routing,
    StepTotals,
    prediction_mask,
    step_counts,
)
from edgerazor.losses.core.divergences import sum_of_kl
from edgerazor.losses.core.layer_selection import METRICS, layer_metric
from edgerazor.losses.core.logit_losses import LogitLoss, TokenLogits, logit_chunks
from edgerazor.losses.core.objective import make, names, total_loss
from edgerazor.losses.core.recorded import RecordedTokens

__all__ = [
    "MASKED",
    "METRICS",
    "Attention",
    "Head",
    "LogitLoss",
    "Loss",
    "Outputs",
    "RecordedTokens",
    "Routing",
    "StepTotals",
    "TokenLogits",
    "layer_metric",
    "logit_chunks",
    "make",
    "names",
    "prediction_mask",
    "step_counts",
    "sum_of_kl",
    "total_loss",
]
