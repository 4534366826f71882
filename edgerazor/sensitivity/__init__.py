"""How much a row in a format hurts the teacher's output: estimates in nats of KL per token (see `analysis.py`)."""

from edgerazor.sensitivity.analysis import Batches, SensitivityAnalysis, combined
from edgerazor.sensitivity.gradients import (
    PER_MATRIX,
    FisherSensitivity,
    IntegratedGradients,
    split_rows_and_matrices,
)
from edgerazor.sensitivity.output_head import OutputHead
from edgerazor.sensitivity.rounding import RoundedWeights

__all__ = [
    "PER_MATRIX",
    "Batches",
    "FisherSensitivity",
    "IntegratedGradients",
    "OutputHead",
    "RoundedWeights",
    "SensitivityAnalysis",
    "combined",
    "split_rows_and_matrices",
]
