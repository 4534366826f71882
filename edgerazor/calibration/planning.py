"""The plan for a budget, made of what was measured: several estimates of sensitivity, and the one that keeps most."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgerazor import formats
from edgerazor.allocate import Plan, SensitivityTable, candidates_of, measures
from edgerazor.calibration.measurement import Measurement
from edgerazor.recipe import Calibrate
from edgerazor.sensitivity import PER_MATRIX, combined


def decide(measurement: Measurement, tensors: dict[str, Tensor]) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what `sensitivity.json` says of it (nothing where the plan measures nothing).

    Args:
        measurement: the teacher, its settings and text.
        tensors: the statistics.

    Raises:
        UserError: the settings do not fit the model.
    """
    context, teacher, settings = measurement.context, measurement.teacher, measurement.settings
    if not measures(settings):
        return context.new_plan(teacher), {}
    tables = sensitivity_tables(settings, tensors)
    plans = {table.estimate: context.new_plan(teacher, table) for table in tables}
    analysis = measurement.analysis
    measured = {estimate: analysis.measure(linear_specs(plan)) for estimate, plan in plans.items()}
    best = min(measured, key=lambda estimate: measured[estimate])
    chosen = next(table for table in tables if table.estimate == best)

    def by_format(values: Tensor) -> dict[str, float]:
        return {name: _five_digits(value) for name, value in zip(chosen.formats, values, strict=True)}

    of_tensors = [
        {
            "name": site.name,
            "kind": site.kind,
            "rows": site.rows,
            "columns": site.columns,
            "damage": by_format(chosen.rows[site.name].sum(1)),
            "alone": by_format(tensors[PER_MATRIX + site.name]),
        }
        for site in teacher.structure.targets
    ]
    summary = {
        "version": 1,
        "estimate": best,
        "tokens": analysis.tokens,
        "model": context.recipe.model,
        "tensors": of_tensors,
        "kv": analysis.measure_kv_caches(),
        "measured_kl": {estimate: _five_digits(value) for estimate, value in measured.items()},
    }
    return plans[best], summary


def _five_digits(value: float | Tensor) -> float:
    return float(f"{value:.5g}")


def sensitivity_tables(settings: Calibrate, tensors: dict[str, Tensor]) -> list[SensitivityTable]:
    """The estimates to plan with, from the statistics."""
    by_estimate: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("damage/"):
            _, estimate, path = name.split("/", 2)
            by_estimate.setdefault(estimate, {})[path] = value.double()
    chosen = settings.sensitivity
    if chosen == "auto":
        by_estimate["combined"] = combined(by_estimate["fisher"], by_estimate["integrated"])
    # Embedding and head have one estimate for all their rows, and that is Fisher's.
    ends = {path: value for path, value in by_estimate["fisher"].items() if len(value[0]) == 1}
    estimates = [chosen] if chosen != "auto" else ["fisher", "integrated", "combined"]
    candidates = candidates_of(settings)
    return [
        SensitivityTable(estimate, candidates, {**ends, **by_estimate[estimate]}, estimate != "hessian")
        for estimate in estimates
    ]


def linear_specs(plan: Plan) -> dict[str, formats.MatrixSpec]:
    """Module path -> formats of the decoder's linear layers."""
    return {matrix.name: matrix.spec() for matrix in plan.matrices if matrix.kind == "linear"}


def weights_by_format(plan: Plan) -> dict[str, int]:
    """Format -> weights of the decoder's linear layers that have it."""
    counts: dict[str, int] = {}
    for matrix in plan.matrices:
        if matrix.kind == "linear":
            for name, count in matrix.spec().weights_by_format((matrix.rows, matrix.columns)).items():
                counts[name] = counts.get(name, 0) + count
    return counts
