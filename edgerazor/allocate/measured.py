"""Formats where they hurt least: measured damage and a budget -> a format for every row or tensor.

Calibrate estimates for every row and format the damage to the teacher's output (`sensitivity/analysis.py`). Estimates
are taken to add up; then the best formats are the solution of a knapsack (`knapsack.py`). At row granularity its items
are tiles of rows of one tensor: the rows are ranked by what the widest format saves them, and cut into sixteens, so that
the number of rows of every format is a multiple of 16, which the kernels like. At tensor granularity they are whole
tensors.

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
#: Of these a plan is made when the recipe names none: up to 4 bits, and above.
CANDIDATES = ("ternary", "int2", "int3", "int4")
WIDE_CANDIDATES = ("int4", "int5", "int8")
#: What a plan of rows may stay below its budget, as a share of it.
TOLERANCE = 0.005

#: Path of a module -> its fields of a `MatrixPlan`.
Choice = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SensitivityTable:
    """What calibrate estimated.

    Attributes:
        estimate: how.
        formats: the candidates.
        rows: module path -> float64 [formats, rows], the damage of a row in a format; [formats, 1] of a whole matrix
            for embedding and head.
        in_nats: whether damages are nats of KL per token, so that their sum is a prediction.
    """

    estimate: str
    formats: tuple[str, ...]
    rows: Mapping[str, Tensor]
    in_nats: bool = True

    def of(self, name: str, candidates: Sequence[str]) -> Tensor:
        """float64 [candidates, rows] of a module."""
        return self.rows[name][[self.formats.index(each) for each in candidates]].double()


@dataclass(frozen=True)
class Items:
    """Rows that get their format together: `rows[i]` (int64 [n]) of the module `names[i]`; None is all of them."""

    names: list[str]
    rows: list[Tensor | None]
    weights: np.ndarray  # float64 [items]
    damages: np.ndarray  # float64 [items, candidates]


def candidates_of(settings: Calibrate) -> tuple[str, ...]:
    """The formats to choose from, the narrowest first.

    Raises:
        UserError: one does not exist, or they cannot give the bits.
    """
    counted, _ = settings.budget()
    usual = CANDIDATES if settings.bits <= 4 else WIDE_CANDIDATES
    names = settings.formats or (usual if counted == "bits" else tuple(dict.fromkeys(CANDIDATES + WIDE_CANDIDATES)))
    widths = [formats.get(name).nominal_bits for name in names]
    if len(set(names)) < len(names):
        raise usage_error(f"--formats is {','.join(names)}; expected different formats.")
    if counted == "bits" and not min(widths) <= settings.bits <= max(widths):
        raise usage_error(
            f"--bits is {settings.bits:g}, but {', '.join(names)} give {min(widths):g} to {max(widths):g} bits.",
            "Ask for bits between, or for other --formats.",
        )
    return tuple(sorted(names, key=lambda name: formats.get(name).nominal_bits))


def is_open(settings: Calibrate) -> bool:
    """Whether anything is to be chosen: not where the bits are those of the narrowest or the widest candidate, but for
    constraints that may not hold there."""
    candidates = candidates_of(settings)
    ends = {formats.get(candidates[0]).nominal_bits, formats.get(candidates[-1]).nominal_bits}
    return settings.budget()[0] != "bits" or settings.bits not in ends or bool(settings.constraints)


def named_budget(bits: float) -> float:
    """Nominal bits a weight that were asked for: 1.58, 1.88, 2.79 and 4 are names, whose shares decide."""
    share = NAMED_SHARES.get(bits)
    if share is None:
        return bits
    return (1 - share) * formats.get("ternary").nominal_bits + share * formats.get("int4").nominal_bits


def cut(
    sites: Sequence[QuantTarget], damages: SensitivityTable, candidates: tuple[str, ...], granularity: str
) -> Items:
    """The items of the knapsack."""
    names: list[str] = []
    rows: list[Tensor | None] = []
    weights, found = [], []
    for site in sites:
        each = damages.of(site.name, candidates)
        tiles: Sequence[Tensor | None] = [None]
        if granularity == "row" and site.kind == "linear":
            tiles = (each[0] - each[-1]).argsort(descending=True, stable=True).split(TILE)
        for tile in tiles:
            chosen = each if tile is None else each[:, tile]
            names.append(site.name)
            rows.append(tile)
            weights.append(float(site.weights if tile is None else len(tile) * site.columns))
            found.append(chosen.sum(1).numpy())
    return Items(names, rows, np.array(weights), np.stack(found))


def allowed(names: Sequence[str], candidates: tuple[str, ...], settings: Calibrate) -> np.ndarray:
    """bool [items, candidates], as the recipe's constraints have it.

    Raises:
        UserError: a constraint matches nothing, or leaves nothing.
    """
    widths = np.array([formats.get(each).nominal_bits for each in candidates])
    result = np.ones((len(names), len(candidates)), dtype=bool)
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
        result[matched] &= fits
        if not result[matched].any(axis=1).all():
            raise usage_error(
                f"The constraint {limit.match!r} leaves none of the formats {', '.join(candidates)}.",
                "Name a wider choice with --formats.",
            )
    return result


def choose(
    sites: Sequence[QuantTarget],
    damages: SensitivityTable,
    settings: Calibrate,
    plan_of: Callable[[Choice], Plan],
    bytes_of: Callable[[Plan], int],
    limit: int | None,
) -> tuple[Choice, float]:
    """Formats of these matrices within the budget.

    Args:
        sites: the matrices whose formats are open.
        damages: of them.
        settings: bits, candidates, granularity, constraints.
        plan_of: the whole plan with such a choice.
        bytes_of: what a plan takes when packed, everything counted.
        limit: such bytes; None: the budget is nominal bits.

    Returns:
        the choice; the sum of the damages.

    Raises:
        UserError: the budget is too small.
    """
    candidates = candidates_of(settings)
    items = cut(sites, damages, candidates, settings.granularity)
    open_ = allowed(items.names, candidates, settings)
    if limit is None:
        bits = np.array([formats.get(each).nominal_bits for each in candidates])
        costs = np.where(open_, items.weights[:, None] * bits, np.inf)
        budget = named_budget(settings.bits) * items.weights.sum()
        found = solve(costs, items.damages, budget)
        if found is None:
            least = float(costs.min(axis=1).sum() / items.weights.sum())
            raise usage_error(
                f"--bits is {settings.bits:g}, but with the recipe's constraints it cannot be less than {least:.3f}.",
                "Ask for more bits, or loosen `constraints`.",
            )
        return _fields(items, candidates, found), found.damage
    best = _within_bytes(items, candidates, open_, sites, plan_of, bytes_of, limit)
    if settings.granularity == "row":  # where matrices are small, saying which row has which format takes many bytes
        whole = cut(sites, damages, candidates, "tensor")
        open_ = allowed(whole.names, candidates, settings)
        best = min(
            best, _within_bytes(whole, candidates, open_, sites, plan_of, bytes_of, limit), key=lambda each: each[1]
        )
    return best


def _within_bytes(
    items: Items,
    candidates: tuple[str, ...],
    open_: np.ndarray,
    sites: Sequence[QuantTarget],
    plan_of: Callable[[Choice], Plan],
    bytes_of: Callable[[Plan], int],
    limit: int,
) -> tuple[Choice, float]:
    """As `choose`. What rows take beside their codes depends on the choice, so the budget of codes is searched for."""
    columns = {site.name: site.columns for site in sites}
    each = [[formats.get(name).row_bytes(columns[item], columns[item]) for name in candidates] for item in items.names]
    rows = items.weights / np.array([columns[name] for name in items.names])
    costs = np.where(open_, rows[:, None] * np.array(each, dtype=np.float64), np.inf)
    low = float(costs.min(axis=1).sum())
    high = min(float(np.where(open_, costs, 0.0).max(axis=1).sum()), float(limit))

    def at(budget: float) -> tuple[Choice, float]:
        found = solve(costs, items.damages, budget)
        assert found is not None
        return _fields(items, candidates, found), found.damage

    def size(found: tuple[Choice, float]) -> int:
        return bytes_of(plan_of(found[0]))

    def refused(smallest: int) -> UserError:
        return usage_error(
            f"The packed model cannot be smaller than {smallest:,} bytes with the formats {', '.join(candidates)}; "
            f"{limit:,} were asked for.",
            "Ask for more, or give narrower --formats or fewer constraints.",
        )

    return fill(at, (low, high), size, limit, refused, TOLERANCE / 10)


def _fields(items: Items, candidates: tuple[str, ...], found: Solution) -> Choice:
    """A solution as fields of the plan's matrices: formats that occur, the narrowest first, and a digit per row."""
    of: dict[str, list[int]] = {}
    for index, name in enumerate(items.names):
        of.setdefault(name, []).append(index)
    choice: Choice = {}
    for name, indices in of.items():
        used = sorted({int(found.choice[index]) for index in indices})
        about: dict[str, Any] = {"formats": tuple(candidates[each] for each in used)}
        if len(used) > 1:
            tiles = [items.rows[index] for index in indices]
            rows = torch.empty(sum(len(tile) for tile in tiles if tile is not None), dtype=torch.int64)
            for index, tile in zip(indices, tiles, strict=True):
                rows[tile] = used.index(int(found.choice[index]))
            about["row_formats"] = digits(rows)
        choice[name] = about
    return choice
