"""A budget -> a format for every row, tensor or block of every matrix.

Two ways: `pattern.py` gives the same share of a wider format to every matrix, as EdgeRazor does (arXiv 2605.04062), and
measures nothing; `measured.py` spends the budget where calibrate has found that it saves most. Embedding and head have
formats of their own unless bytes are counted, and so have matrices that the recipe names. Everything downstream reads
only the plan (`plan.py`).
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
from edgerazor.allocate.knapsack import Solution, solve
from edgerazor.allocate.measured import SensitivityTable, candidates_of
from edgerazor.allocate.pattern import NAMED_SHARES, Mixture, mixture_of, spread, variances
from edgerazor.allocate.plan import MatrixPlan, Plan
from edgerazor.errors import UserError, usage_error
from edgerazor.models import QuantTarget
from edgerazor.packed import FolderSize
from edgerazor.recipe import MAXIMUM_BITS, MINIMUM_BITS, Calibrate, Override

__all__ = [
    "NAMED_SHARES",
    "MatrixPlan",
    "Mixture",
    "Plan",
    "SensitivityTable",
    "Solution",
    "candidates_of",
    "check",
    "make_plan",
    "measures",
    "mixture_of",
    "shortfall",
    "solve",
    "spread",
    "unmeasured",
    "variances",
]

#: What a plan takes when packed, everything counted.
SizeOf = Callable[[Plan], FolderSize]


def make_plan(
    sites: Iterable[QuantTarget],
    settings: Calibrate,
    weight_of: Callable[[str], Tensor] | None = None,
    damages: SensitivityTable | None = None,
    size_of: SizeOf | None = None,
) -> Plan:
    """Formats for every matrix within the budget.

    Args:
        sites: the matrices of the model.
        settings: the budget, formats, group size, strategy, formats of embedding and head, overrides, constraints.
        weight_of: gives the weight [rows, columns] of a module's path; asked one matrix at a time, and only by
            strategies that look at weights.
        damages: what calibrate found; asked for by the strategy `sensitivity`.
        size_of: asked for where bytes are counted.

    Raises:
        UserError: the settings contradict themselves (as `check`), do not fit the model, or the budget is too small.
    """
    sites = tuple(sites)
    check(settings)
    counted, value = settings.budget()
    if counted != "bits" and size_of is None:
        raise ValueError("a budget of bytes needs to know what a plan takes")
    fixed = fixed_formats(sites, settings)
    if settings.plan == "sensitivity" and damages is not None:
        return _measured_plan(sites, settings, fixed, damages, size_of)
    if measures(settings):
        raise ValueError("the strategy sensitivity was given no damages")
    settings = unmeasured(settings)
    if counted == "bits":
        return _pattern_plan(sites, settings, fixed, weight_of)
    assert size_of is not None
    widths = [formats.get(name).nominal_bits for name in settings.formats] or [MINIMUM_BITS, MAXIMUM_BITS]
    between = widths[0], widths[-1]

    def plan_at(bits: float) -> Plan:
        return _pattern_plan(sites, _at(settings, bits), fixed, weight_of)

    return _largest(plan_at, between, size_of, counted, value)


def _measured_plan(
    sites: tuple[QuantTarget, ...],
    settings: Calibrate,
    fixed: dict[str, str],
    damages: SensitivityTable,
    size_of: SizeOf | None,
) -> Plan:
    choosing = [site for site in sites if site.name not in fixed]
    alone = {name: {"formats": (format_,)} for name, format_ in fixed.items()}
    if not choosing:
        return _plan(sites, settings, alone)

    def plan_of(choice: measured.Choice) -> Plan:
        return _plan(sites, settings, alone | choice, damages.estimate)

    def bytes_of(plan: Plan) -> int:
        assert size_of is not None
        return size_of(plan).bytes

    limit = None
    counted, value = settings.budget()
    if counted != "bits":
        assert size_of is not None
        narrowest = {site.name: {"formats": (candidates_of(settings)[0],)} for site in choosing}
        limit = _bytes(counted, value, size_of(plan_of(narrowest)))
    choice, damage = measured.choose(choosing, damages, settings, plan_of, bytes_of, limit)
    return plan_of(choice).model_copy(update={"predicted_kl": damage if damages.in_nats else None})


def _bytes(counted: str, value: float, any_size: FolderSize) -> int:
    """A budget of real bits or bytes in bytes."""
    return int(value if counted == "target_size" else value * any_size.weights / 8)


def _pattern_plan(
    sites: tuple[QuantTarget, ...],
    settings: Calibrate,
    fixed: dict[str, str],
    weight_of: Callable[[str], Tensor] | None,
) -> Plan:
    mixture = mixture_of(settings)
    about: dict[str, dict[str, Any]] = {}
    for site in sites:
        if site.name in fixed:
            about[site.name] = {"formats": (fixed[site.name],)}
        else:
            about[site.name] = pattern.described(pattern.choose(site, settings, mixture, weight_of), mixture)
    return _plan(sites, settings, about)


def _largest(
    plan_at: Callable[[float], Plan], between: tuple[float, float], size_of: SizeOf, counted: str, value: float
) -> Plan:
    """The plan of the most bits that is not larger than asked for."""
    limit = _bytes(counted, value, size_of(plan_at(between[0])))

    def size(plan: Plan) -> int:
        return size_of(plan).bytes

    def refused(smallest: int) -> UserError:
        return usage_error(
            f"The packed model cannot be smaller than {smallest:,} bytes; {limit:,} were asked for.",
            "Ask for more, or give narrower formats.",
        )

    return fill(plan_at, between, size, limit, refused)


def _at(settings: Calibrate, bits: float) -> Calibrate:
    return settings.model_copy(update={"bits": bits, "real_bits": None, "target_size": None})


def _plan(
    sites: tuple[QuantTarget, ...], settings: Calibrate, about: dict[str, dict[str, Any]], estimate: str | None = None
) -> Plan:
    """The plan whose matrices have these formats."""
    matrices = tuple(
        MatrixPlan(
            name=site.name,
            kind=site.kind,
            rows=site.rows,
            columns=site.columns,
            group_size=settings.group_size,
            published=settings.init == "rtn",
            **about[site.name],
        )
        for site in sites
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
    """Whether a plan needs damages."""
    return settings.plan == "sensitivity" and measured.is_open(settings)


def shortfall(plan: Plan, settings: Calibrate) -> str:
    """In words, how far a plan by sensitivity stays below its budget of bits; empty where that is next to nothing."""
    counted, _ = settings.budget()
    fixed = [override.match for override in settings.overrides]
    open_ = [
        matrix
        for matrix in plan.matrices
        if matrix.kind == "linear" and not any(fnmatchcase(matrix.name, match) for match in fixed)
    ]
    if counted != "bits" or not open_ or not measures(settings):
        return ""
    weights = [matrix.rows * matrix.columns for matrix in open_]
    bits = [matrix.spec().nominal_bits(matrix.shape) for matrix in open_]
    found = sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)
    asked = measured.named_budget(settings.bits)
    if found >= (1 - measured.TOLERANCE) * asked:
        return ""
    return f"No plan of whole units has {asked:g} bits; the nearest that is worth its bits has {found:.4g}."


def unmeasured(settings: Calibrate) -> Calibrate:
    """What to plan with where nothing has been measured: the interleave of the two formats around the bits."""
    if settings.plan != "sensitivity":
        return settings
    names = sorted(settings.formats, key=lambda name: formats.get(name).nominal_bits)
    counted, _ = settings.budget()
    if len(names) > 2 and counted == "bits":
        low = [name for name in names if formats.get(name).nominal_bits <= settings.bits][-1]
        high = next(name for name in names if formats.get(name).nominal_bits >= settings.bits)
        index = names.index(low)
        names = [low, high] if low != high else names[max(index - 1, 0) :][:2]
    elif len(names) == 1:  # mixed with nothing
        names = sorted([*names, "int8" if names != ["int8"] else "int4"], key=lambda n: formats.get(n).nominal_bits)
    elif len(names) != 2:
        names = []
    update = {"plan": "interleave", "granularity": "row", "formats": tuple(names), "constraints": ()}
    return settings.model_copy(update=update)


# --- what was asked for ------------------------------------------------------------------------


def check(settings: Calibrate) -> None:
    """Refuse, without looking at a model, what cannot be planned.

    Raises:
        UserError: a format that does not exist, or formats that do not give the bits.
    """
    named = [settings.embedding_format, settings.head_format, *(each.format for each in settings.overrides)]
    for name in named:
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


def fixed_formats(sites: tuple[QuantTarget, ...], settings: Calibrate) -> dict[str, str]:
    """Module path -> format, for the matrices whose format does not depend on the bits.

    Raises:
        UserError: an override that changes nothing, or a format for a head that is tied to the embedding.
    """
    counting_bytes = settings.plan == "sensitivity" and settings.budget()[0] != "bits"
    fixed = {site.name: settings.embedding_format for site in sites if site.kind == "embedding" and not counting_bytes}
    heads = [site.name for site in sites if site.kind == "head"]
    if settings.head_format is not None and not heads:
        raise usage_error(
            f"`head_format` is {settings.head_format}, but the model's head is tied to its embedding.",
            "Leave it out, and set `embedding_format` for both.",
        )
    if not counting_bytes:
        fixed |= dict.fromkeys(heads, settings.head_format or settings.embedding_format)
    left = [site.name for site in sites]
    for override in settings.overrides:
        matched = [name for name in left if fnmatchcase(name, override.match)]
        if not matched:
            raise _useless(override, [site.name for site in sites])
        fixed |= dict.fromkeys(matched, override.format)
        left = [name for name in left if name not in matched]
    return fixed


def _useless(override: Override, names: list[str]) -> UserError:
    if any(fnmatchcase(name, override.match) for name in names):
        return usage_error(
            f"The override {override.match!r} changes nothing: earlier ones match all its modules.",
            "The first override that matches a module counts; put this one before them.",
        )
    size = override.match.count(".") + 1

    def likeness(name: str) -> float:
        end = ".".join(name.split(".")[-size:])
        return difflib.SequenceMatcher(None, end, override.match).ratio()

    kinds = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}  # the first module of each name
    close = sorted(kinds.values() if set("*?[") & set(override.match) else names, key=likeness, reverse=True)[:3]
    return usage_error(
        f"The override {override.match!r} matches no quantized module; the closest are {', '.join(close)}.",
        "`match` is a glob on the whole path of a module, as in *.down_proj.",
    )
