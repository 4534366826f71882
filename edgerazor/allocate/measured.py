"""Formats where they hurt least: measured sensitivities and a budget -> a format for every row or tensor.

Calibrate estimates for every row and format how far the teacher's output moves (`sensitivity/analysis.py`). These
estimates are assumed to add up; then the best formats are the solution of a knapsack (`knapsack.py`). At row
granularity its items are tiles of rows of one tensor: the rows are ranked by what the widest format saves them and cut
into tiles of sixteen, so that the number of rows of every format is a multiple of 16, as the kernels like it. At tensor
granularity the items are whole tensors.

An expert that calibration never reached has no sensitivity to go by. Its matrices take no part in the knapsack and get
the average bits of the linear layers that do.

Under a budget of nominal bits the items are the decoder's linear layers, and embedding and head keep formats of their
own. Under a budget of bytes embedding and head compete too, each with one format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.allocate.filling import fill
from edgerazor.allocate.knapsack import Solution, solve
from edgerazor.allocate.pattern import NAMED_SHARES
from edgerazor.allocate.plan import Plan, digits
from edgerazor.errors import UserError, usage_error
from edgerazor.models import QuantTarget
from edgerazor.recipe import Calibrate

#: Rows of a format come in multiples of this where the tensor allows.
TILE = 16
#: Candidate formats where the recipe names none: up to 4 bits, and above.
CANDIDATES = ("ternary", "int2", "int3", "int4")
WIDE_CANDIDATES = ("int4", "int5", "int8")
#: Share of its budget that a plan of rows may leave unused.
TOLERANCE = 0.005

#: Module path -> fields of its `MatrixPlan`.
Choice = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SensitivityTable:
    """Measured sensitivities of the rows of a model.

    Attributes:
        estimate: how they were measured.
        formats: the formats they were measured for.
        rows: module path -> float64 [formats, rows], the sensitivity of a row in a format; [formats, 1] of a whole
            matrix for embedding and head.
        in_nats: whether they are nats of KL per token, so that their sum predicts the KL of a plan.
    """

    estimate: str
    formats: tuple[str, ...]
    rows: Mapping[str, Tensor]
    in_nats: bool = True

    def of(self, name: str, candidates: Sequence[str]) -> Tensor:
        """The sensitivities of a module's rows in some formats, float64 [candidates, rows]."""
        return self.rows[name][[self.formats.index(candidate) for candidate in candidates]].double()


@dataclass(frozen=True)
class Items:
    """The items of the knapsack: rows that get their format together.

    Attributes:
        names: module path of each item.
        rows: int64 [n], the rows of that module; None means all of them.
        columns: columns of that module's matrix.
        weights: float64 [items], number of weights.
        sensitivities: float64 [items, candidates].
        known: bool [items], whether anything is known of their sensitivity.
        linear: bool [items], whether they are of linear layers.
    """

    names: list[str]
    rows: list[Tensor | None]
    columns: list[int]
    weights: np.ndarray
    sensitivities: np.ndarray
    known: np.ndarray
    linear: np.ndarray


def candidates_of(settings: Calibrate) -> tuple[str, ...]:
    """The formats to choose from, the narrowest first.

    Raises:
        UserError: one does not exist, or they cannot give the bits.
    """
    unit, _ = settings.budget()
    defaults: tuple[str, ...] = CANDIDATES if settings.bits <= 4 else WIDE_CANDIDATES
    if unit != "bits":
        defaults = tuple(dict.fromkeys(CANDIDATES + WIDE_CANDIDATES))
    names = settings.formats or defaults
    widths = [formats.get(name).nominal_bits for name in names]
    if len(set(names)) < len(names):
        raise usage_error(f"--formats is {','.join(names)}; expected different formats.")
    if unit == "bits" and not min(widths) <= settings.bits <= max(widths):
        raise usage_error(
            f"--bits is {settings.bits:g}, but {', '.join(names)} give {min(widths):g} to {max(widths):g} bits.",
            "Ask for bits between, or for other --formats.",
        )
    return tuple(sorted(names, key=lambda name: formats.get(name).nominal_bits))


def is_open(settings: Calibrate) -> bool:
    """Whether there is a choice to make.

    There is none where the bits are those of the narrowest or the widest candidate, unless constraints forbid that one.
    """
    candidates = candidates_of(settings)
    ends = {formats.get(candidates[0]).nominal_bits, formats.get(candidates[-1]).nominal_bits}
    return settings.budget()[0] != "bits" or settings.bits not in ends or bool(settings.constraints)


def named_budget(bits: float) -> float:
    """Requested nominal bits per weight: 1.58, 1.88, 2.79 and 4 are names of a share of int4 rows, which decides."""
    share = NAMED_SHARES.get(bits)
    if share is None:
        return bits
    return (1 - share) * formats.get("ternary").nominal_bits + share * formats.get("int4").nominal_bits


def knapsack_items(
    targets: Sequence[QuantTarget], sensitivities: SensitivityTable, candidates: tuple[str, ...], granularity: str
) -> Items:
    """The items of the knapsack: tiles of rows at `row` granularity, else whole tensors."""
    names: list[str] = []
    rows: list[Tensor | None] = []
    columns: list[int] = []
    weights, item_sensitivities = [], []
    known, linear = [], []
    for target in targets:
        row_sensitivities = sensitivities.of(target.name, candidates)
        tiles: Sequence[Tensor | None] = [None]
        if granularity == "row" and target.kind == "linear":
            saved = row_sensitivities[0] - row_sensitivities[-1]
            tiles = saved.argsort(descending=True, stable=True).split(TILE)
        for tile in tiles:
            tile_sensitivities = row_sensitivities if tile is None else row_sensitivities[:, tile]
            names.append(target.name)
            rows.append(tile)
            columns.append(target.columns)
            weights.append(float(target.weights if tile is None else len(tile) * target.columns))
            item_sensitivities.append(tile_sensitivities.sum(1).numpy())
            known.append(not target.experts or bool(row_sensitivities.any()))
            linear.append(target.kind == "linear")
    flags = np.array(known), np.array(linear)
    return Items(names, rows, columns, np.array(weights), np.stack(item_sensitivities), *flags)


def allowed_candidates(names: Sequence[str], candidates: tuple[str, ...], settings: Calibrate) -> np.ndarray:
    """Which format each item may take by the recipe's constraints: bool [items, candidates].

    Raises:
        UserError: a constraint matches no item, or leaves an item no format.
    """
    widths = np.array([formats.get(candidate).nominal_bits for candidate in candidates])
    allowed = np.ones((len(names), len(candidates)), dtype=bool)
    for limit in settings.constraints:
        matched = np.array([fnmatchcase(name, limit.match) for name in names])
        if not matched.any():
            raise usage_error(
                f"The constraint {limit.match!r} matches no matrix whose format is to be chosen.",
                "`match` is a glob on the whole path of a module, as in *.o_proj.",
            )
        fits = np.ones(len(candidates), dtype=bool)
        if limit.at_least is not None:
            fits &= widths >= formats.get(limit.at_least).nominal_bits
        if limit.at_most is not None:
            fits &= widths <= formats.get(limit.at_most).nominal_bits
        allowed[matched] &= fits
        if not allowed[matched].any(axis=1).all():
            raise usage_error(
                f"The constraint {limit.match!r} leaves none of the formats {', '.join(candidates)}.",
                "Name a wider choice with --formats.",
            )
    return allowed


def choose(
    targets: Sequence[QuantTarget],
    sensitivities: SensitivityTable,
    settings: Calibrate,
    plan_of: Callable[[Choice], Plan],
    bytes_of: Callable[[Plan], int],
    limit: int | None,
) -> tuple[Choice, float]:
    """Formats of these matrices within the budget.

    Args:
        targets: the matrices whose formats are open.
        sensitivities: of them.
        settings: bits, candidates, granularity, constraints.
        plan_of: the whole plan with such a choice.
        bytes_of: size of the packed model of a plan, everything counted.
        limit: most such bytes; None: the budget is nominal bits.

    Returns:
        The choice, and the sum of its sensitivities.

    Raises:
        UserError: the budget is too small.
    """
    candidates = candidates_of(settings)
    items = knapsack_items(targets, sensitivities, candidates, settings.granularity)
    if limit is None:
        return _within_bits(items, candidates, settings)
    best = _within_bytes(items, candidates, settings, plan_of, bytes_of, limit)
    if settings.granularity == "row":  # where matrices are small, the format indices of rows take many bytes
        tensors = knapsack_items(targets, sensitivities, candidates, "tensor")
        by_tensor = _within_bytes(tensors, candidates, settings, plan_of, bytes_of, limit)
        best = min(best, by_tensor, key=lambda choice: choice[1])
    return best


def _within_bits(items: Items, candidates: tuple[str, ...], settings: Calibrate) -> tuple[Choice, float]:
    """As `choose`, with a budget of nominal bits."""
    allowed = allowed_candidates(items.names, candidates, settings)
    bits = np.array([formats.get(name).nominal_bits for name in candidates])
    costs = np.where(allowed, items.weights[:, None] * bits, np.inf)
    known = items.known
    solution = solve(costs[known], items.sensitivities[known], named_budget(settings.bits) * items.weights[known].sum())
    if solution is None:
        least = float(costs.min(axis=1).sum() / items.weights.sum())
        raise usage_error(
            f"--bits is {settings.bits:g}, but with the recipe's constraints it cannot be less than {least:.3f}.",
            "Ask for more bits, or loosen `constraints`.",
        )
    chosen = _with_average(items, candidates, solution, allowed)
    return _plan_fields(items, candidates, chosen), solution.sensitivity


def _with_average(items: Items, candidates: tuple[str, ...], solution: Solution, allowed: np.ndarray) -> np.ndarray:
    """The candidate of every item, int64 [items]: the solution's, and of items of which nothing is known the average.

    Of these, as many get the format above the average bits of the solution's linear layers as make up that average,
    spread evenly over them, and the others the format below it.
    """
    chosen = np.zeros(len(items.names), dtype=np.int64)
    chosen[items.known] = solution.choice
    widths = np.array([formats.get(name).nominal_bits for name in candidates])
    measured = items.known & items.linear
    if items.known.all() or not measured.any():
        return chosen
    average = float((widths[chosen] * items.weights)[measured].sum() / items.weights[measured].sum())
    owed = 0.0  # bits of weights that earlier ones got less than the average
    for index in np.flatnonzero(~items.known):
        possible = np.flatnonzero(allowed[index])
        owed += average * items.weights[index]
        affordable = possible[widths[possible] * items.weights[index] <= owed + 1e-6]
        nearby = affordable[widths[affordable] <= _next_width(widths[possible], average) + 1e-9]
        chosen[index] = nearby[-1] if len(nearby) else possible[0]
        owed -= widths[chosen[index]] * items.weights[index]
    return chosen


def _next_width(widths: np.ndarray, average: float) -> float:
    """The least of these bits that is not below the average; the largest where all are."""
    above = widths[widths >= average - 1e-9]
    return float(above.min() if len(above) else widths.max())


def _within_bytes(
    items: Items,
    candidates: tuple[str, ...],
    settings: Calibrate,
    plan_of: Callable[[Choice], Plan],
    bytes_of: Callable[[Plan], int],
    limit: int,
) -> tuple[Choice, float]:
    """As `choose`, with a limit of bytes.

    Beside its codes a row takes bytes that depend on the choice (scales, padding, format indices), so the budget of
    codes is what is searched for.
    """
    allowed = allowed_candidates(items.names, candidates, settings)
    row_bytes = [[formats.get(name).row_bytes(cols, cols) for name in candidates] for cols in items.columns]
    rows = items.weights / np.array(items.columns)
    costs = np.where(allowed, rows[:, None] * np.array(row_bytes, dtype=np.float64), np.inf)
    known = items.known
    low, low_known = float(costs.min(axis=1).sum()), float(costs[known].min(axis=1).sum())
    share = float(items.weights[known].sum() / items.weights.sum())
    high = min(float(np.where(allowed, costs, 0.0).max(axis=1).sum()), float(limit))

    def choice_at(budget: float) -> tuple[Choice, float]:
        solution = solve(costs[known], items.sensitivities[known], low_known + (budget - low) * share)
        assert solution is not None
        chosen = _with_average(items, candidates, solution, allowed)
        return _plan_fields(items, candidates, chosen), solution.sensitivity

    def choice_bytes(choice: tuple[Choice, float]) -> int:
        return bytes_of(plan_of(choice[0]))

    def too_small(smallest: int) -> UserError:
        return usage_error(
            f"The packed model cannot be smaller than {smallest:,} bytes with the formats {', '.join(candidates)}; "
            f"{limit:,} were asked for.",
            "Ask for more, or give narrower --formats or fewer constraints.",
        )

    return fill(choice_at, (low, high), choice_bytes, limit, too_small, TOLERANCE / 10)


def _plan_fields(items: Items, candidates: tuple[str, ...], chosen: np.ndarray) -> Choice:
    """Fields of the plan's matrices, from the candidate of every item: formats that occur, the narrowest first, and a
    digit per row."""
    items_of: dict[str, list[int]] = {}
    for index, name in enumerate(items.names):
        items_of.setdefault(name, []).append(index)
    choice: Choice = {}
    for name, indices in items_of.items():
        used = sorted({int(chosen[index]) for index in indices})
        fields: dict[str, Any] = {"formats": tuple(candidates[candidate] for candidate in used)}
        if len(used) > 1:
            tiles = [items.rows[index] for index in indices]
            row_formats = torch.empty(sum(len(tile) for tile in tiles if tile is not None), dtype=torch.int64)
            for index, tile in zip(indices, tiles, strict=True):
                row_formats[tile] = used.index(int(chosen[index]))
            fields["row_formats"] = digits(row_formats)
        choice[name] = fields
    return choice
