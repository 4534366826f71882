"""From a budget to a plan: a format for every row, block or tensor of every matrix.

`planning.py` makes the plan (`plan.py`). `pattern.py` gives every matrix the same share of a wider format and measures
nothing; `measured.py` spends the budget where the measured sensitivity says that it saves most (`knapsack.py`).
"""

from edgerazor.allocate.knapsack import Solution, solve
from edgerazor.allocate.measured import SensitivityTable, candidates_of
from edgerazor.allocate.pattern import NAMED_SHARES, Mixture, mixture_of, spread, variances
from edgerazor.allocate.plan import MatrixPlan, Plan
from edgerazor.allocate.planning import check, fixed_formats, make_plan, measures, shortfall, unmeasured
from edgerazor.allocate.sensitivity_cost import (
    FEWEST_TOKENS,
    affordable_tokens,
    estimates_of,
    passes_of,
    sequences_of,
)

__all__ = [
    "FEWEST_TOKENS",
    "NAMED_SHARES",
    "MatrixPlan",
    "Mixture",
    "Plan",
    "SensitivityTable",
    "Solution",
    "affordable_tokens",
    "candidates_of",
    "check",
    "estimates_of",
    "fixed_formats",
    "make_plan",
    "measures",
    "mixture_of",
    "passes_of",
    "sequences_of",
    "shortfall",
    "solve",
    "spread",
    "unmeasured",
    "variances",
]
