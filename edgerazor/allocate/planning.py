"""Making a plan: which matrices are open, what their budget is, and which strategy chooses their formats.

Embedding and head have formats of their own unless bytes are counted, and so have matrices that the recipe names. The
formats of the others are chosen by `pattern.py` or `measured.py`. Everything downstream reads only the plan.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from edgerazor import formats
from edgerazor.allocate import measured, pattern
from edgerazor.allocate.filling import fill
from edgerazor.allocate.measured import SensitivityTable, candidates_of
from edgerazor.allocate.pattern import mixture_of
from edgerazor.allocate.plan import MatrixPlan, Plan
from edgerazor.errors import UserError, usage_error
from edgerazor.models import QuantTarget
from edgerazor.packed import FolderSize
from edgerazor.recipe import MAXIMUM_BITS, MINIMUM_BITS, Calibrate, Override

#: Size of the packed model that a plan gives, everything counted.
SizeOf = Callable[[Plan], FolderSize]


def make_plan(
    targets: Iterable[QuantTarget],
    settings: Calibrate,
    weight_of: Callable[[str], Tensor] | None = None,
    sensitivities: SensitivityTable | None = None,
    size_of: SizeOf | None = None,
) -> Plan:
    """Formats for every matrix within the budget.

    Args:
        targets: the matrices of the model.
        settings: the budget, formats, group size, strategy, formats of embedding and head, overrides, constraints.
        weight_of: gives the weight [rows, columns] of a module's path; called for one matrix at a time, and only by
            strategies that look at weights.
        sensitivities: what calibrate has measured; only the strategy `sensitivity` reads it.
        size_of: needed where bytes are counted.

    Raises:
        UserError: the settings contradict themselves (as `check`), do not fit the model, or the budget is too small.
    """
    targets = tuple(targets)
    check(settings)
    unit, budget = settings.budget()
    if unit != "bits" and size_of is None:
        raise ValueError("a budget of bytes needs to know the size of a plan")
    fixed = fixed_formats(targets, settings)
    if settings.plan == "sensitivity" and sensitivities is not None:
        return _measured_plan(targets, settings, fixed, sensitivities, size_of)
    if measures(settings):
        raise ValueError("the strategy sensitivity was given no sensitivities")
    settings = unmeasured(settings)
    if unit == "bits":
        return _pattern_plan(targets, settings, fixed, weight_of)
    assert size_of is not None
    widths = [formats.get(name).nominal_bits for name in settings.formats] or [MINIMUM_BITS, MAXIMUM_BITS]

    def plan_at(bits: float) -> Plan:
        return _pattern_plan(targets, _with_bits(settings, bits), fixed, weight_of)

    return _largest_plan(plan_at, (widths[0], widths[-1]), size_of, unit, budget)


def _measured_plan(
    targets: tuple[QuantTarget, ...],
    settings: Calibrate,
    fixed: dict[str, str],
    sensitivities: SensitivityTable,
    size_of: SizeOf | None,
) -> Plan:
    """The plan by `measured.py` of all targets whose format is not fixed."""
    open_targets = [target for target in targets if target.name not in fixed]
    fixed_fields = {name: {"formats": (format_,)} for name, format_ in fixed.items()}
    if not open_targets:
        return _plan(targets, settings, fixed_fields)

    def plan_of(choice: measured.Choice) -> Plan:
        return _plan(targets, settings, fixed_fields | choice, sensitivities.estimate)

    def bytes_of(plan: Plan) -> int:
        assert size_of is not None
        return size_of(plan).bytes

    limit = None
    unit, budget = settings.budget()
    if unit != "bits":
        assert size_of is not None
        narrowest = {target.name: {"formats": (candidates_of(settings)[0],)} for target in open_targets}
        limit = _budget_bytes(unit, budget, size_of(plan_of(narrowest)))
    choice, predicted = measured.choose(open_targets, sensitivities, settings, plan_of, bytes_of, limit)
    return plan_of(choice).model_copy(update={"predicted_kl": predicted if sensitivities.in_nats else None})


def _budget_bytes(unit: str, budget: float, any_size: FolderSize) -> int:
    """A budget of real bits or of bytes, in bytes."""
    return int(budget if unit == "target_size" else budget * any_size.weights / 8)


def _pattern_plan(
    targets: tuple[QuantTarget, ...],
    settings: Calibrate,
    fixed: dict[str, str],
    weight_of: Callable[[str], Tensor] | None,
) -> Plan:
    """The plan by `pattern.py` of all targets whose format is not fixed."""
    mixture = mixture_of(settings)
    matrix_fields: dict[str, dict[str, Any]] = {}
    for target in targets:
        if target.name in fixed:
            matrix_fields[target.name] = {"formats": (fixed[target.name],)}
        else:
            wide = pattern.choose(target, settings, mixture, weight_of)
            matrix_fields[target.name] = pattern.plan_fields(wide, mixture)
    return _plan(targets, settings, matrix_fields)


def _largest_plan(
    plan_at: Callable[[float], Plan], bounds: tuple[float, float], size_of: SizeOf, unit: str, budget: float
) -> Plan:
    """The plan of the most bits that is within the budget.

    Which rows have which format takes bytes, too: a single format may fit where a mixture of fewer bits does not.
    """
    limit = _budget_bytes(unit, budget, size_of(plan_at(bounds[0])))

    def bytes_of(plan: Plan) -> int:
        return size_of(plan).bytes

    def too_small(smallest: int) -> UserError:
        return usage_error(
            f"The packed model cannot be smaller than {smallest:,} bytes; {limit:,} were asked for.",
            "Ask for more, or give narrower formats.",
        )

    filled = fill(plan_at, bounds, bytes_of, limit, too_small)
    widths = {format_.nominal_bits for format_ in map(formats.get, formats.names())}
    single = (plan_at(bits) for bits in sorted(widths) if bounds[0] <= bits <= bounds[1])
    return max((filled, *(plan for plan in single if bytes_of(plan) <= limit)), key=Plan.nominal_bits)


def _with_bits(settings: Calibrate, bits: float) -> Calibrate:
    """The settings with a budget of nominal bits instead of one of bytes."""
    return settings.model_copy(update={"bits": bits, "real_bits": None, "target_size": None})


def _plan(
    targets: tuple[QuantTarget, ...],
    settings: Calibrate,
    matrix_fields: dict[str, dict[str, Any]],
    estimate: str | None = None,
) -> Plan:
    """The plan whose matrices have these formats.

    Args:
        targets, settings: as for `make_plan`.
        matrix_fields: module path -> `formats` and `row_formats` or `block_formats` of its `MatrixPlan`.
        estimate: how sensitivities were measured, where they were.
    """
    matrices = tuple(
        MatrixPlan(
            name=target.name,
            kind=target.kind,
            rows=target.rows,
            columns=target.columns,
            group_size=settings.group_size,
            published=settings.init == "rtn",
            rotation=settings.rotation,
            **matrix_fields[target.name],
        )
        for target in targets
    )
    return Plan(
        requested_bits=settings.bits,
        strategy=settings.plan,
        estimate=estimate,
        granularity=settings.granularity,
        activation_bits=settings.activation_bits,
        activation_scales=settings.activation_scales,
        kv_bits=settings.kv_bits,
        query_bits=settings.query_bits,
        probability_bits=settings.probability_bits,
        adaptive_tokens=settings.adaptive_tokens,
        group_size=settings.group_size,
        scales=settings.scales,
        matrices=matrices,
    )


def measures(settings: Calibrate) -> bool:
    """Whether a plan needs measured sensitivities."""
    return settings.plan == "sensitivity" and measured.is_open(settings)


def shortfall(plan: Plan, settings: Calibrate) -> str:
    """One sentence on how far a plan by sensitivity stays below its budget of bits; empty where it hardly does."""
    unit, _ = settings.budget()
    overridden = [override.match for override in settings.overrides]
    open_matrices = [
        matrix
        for matrix in plan.matrices
        if matrix.kind == "linear" and not any(fnmatchcase(matrix.name, match) for match in overridden)
    ]
    if unit != "bits" or not open_matrices or not measures(settings):
        return ""
    weights = [matrix.rows * matrix.columns for matrix in open_matrices]
    matrix_bits = [matrix.spec().nominal_bits(matrix.shape) for matrix in open_matrices]
    planned_bits = sum(w * b for w, b in zip(weights, matrix_bits, strict=True)) / sum(weights)
    requested_bits = measured.named_budget(settings.bits)
    if planned_bits >= (1 - measured.TOLERANCE) * requested_bits:
        return ""
    return (
        f"No plan of whole units has {requested_bits:g} bits; "
        f"the nearest that is worth its bits has {planned_bits:.4g}."
    )


def unmeasured(settings: Calibrate) -> Calibrate:
    """The settings to plan with where nothing has been measured: interleave the two formats around the bits."""
    if settings.plan != "sensitivity":
        return settings
    names = sorted(settings.formats, key=lambda name: formats.get(name).nominal_bits)
    unit, _ = settings.budget()
    if len(names) > 2 and unit == "bits":
        low = [name for name in names if formats.get(name).nominal_bits <= settings.bits][-1]
        high = next(name for name in names if formats.get(name).nominal_bits >= settings.bits)
        index = names.index(low)
        names = [low, high] if low != high else names[max(index - 1, 0) :][:2]
    elif len(names) > 2:
        names = []
    update = {"plan": "interleave", "granularity": "row", "formats": tuple(names), "constraints": ()}
    return settings.model_copy(update=update)


# --- checks ------------------------------------------------------------------------------------


def check(settings: Calibrate) -> None:
    """Refuse, without looking at a model, settings that no plan can follow.

    Raises:
        UserError: a format does not exist, or the formats do not give the bits.
    """
    format_names = [settings.embedding_format, settings.head_format, *(rule.format for rule in settings.overrides)]
    for name in format_names:
        if name is not None:
            formats.get(name)
    for limit in settings.constraints:
        for name in (limit.at_least, limit.at_most):
            if name is not None:
                formats.get(name)
    if settings.plan == "sensitivity":
        candidates_of(settings)
    elif settings.budget()[0] == "bits":
        mixture_of(settings)


def fixed_formats(targets: tuple[QuantTarget, ...], settings: Calibrate) -> dict[str, str]:
    """Module path -> format, for the matrices whose format does not depend on the bits.

    Raises:
        UserError: an override that changes nothing, or a format for a head that is tied to the embedding.
    """
    counting_bytes = settings.plan == "sensitivity" and settings.budget()[0] != "bits"
    fixed = {
        target.name: settings.embedding_format
        for target in targets
        if target.kind == "embedding" and not counting_bytes
    }
    heads = [target.name for target in targets if target.kind == "head"]
    if settings.head_format is not None and not heads:
        raise usage_error(
            f"`head_format` is {settings.head_format}, but the model's head is tied to its embedding.",
            "Leave it out, and set `embedding_format` for both.",
        )
    if not counting_bytes:
        fixed |= dict.fromkeys(heads, settings.head_format or settings.embedding_format)
    remaining = [target.name for target in targets]
    for override in settings.overrides:
        matched = [name for name in remaining if fnmatchcase(name, override.match)]
        if not matched:
            raise _useless_override(override, [target.name for target in targets])
        fixed |= dict.fromkeys(matched, override.format)
        remaining = [name for name in remaining if name not in matched]
    return fixed


def _useless_override(override: Override, names: list[str]) -> UserError:
    """The error for an override that changes nothing in a model whose modules have these names."""
    if any(fnmatchcase(name, override.match) for name in names):
        return usage_error(
            f"The override {override.match!r} changes nothing: earlier ones match all its modules.",
            "The first override that matches a module counts; put this one before them.",
        )
    size = override.match.count(".") + 1

    def likeness(name: str) -> float:
        end = ".".join(name.split(".")[-size:])
        return difflib.SequenceMatcher(None, end, override.match).ratio()

    last_names = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}  # the first module of each last name
    close = sorted(last_names.values() if set("*?[") & set(override.match) else names, key=likeness, reverse=True)[:3]
    return usage_error(
        f"The override {override.match!r} matches no quantized module; the closest are {', '.join(close)}.",
        "`match` is a glob on the whole path of a module, as in *.down_proj.",
    )
