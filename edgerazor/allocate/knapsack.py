"""The multiple-choice knapsack: one option for every item, the least damage that a budget buys.

Every item (a tensor, some rows) must take one of its options (formats), each with a cost (bits) and a damage (nats).
Only options on the lower convex hull of an item's (cost, damage) points can pay off at some price per bit. Walking down
all hulls at once, the steepest step first, is Lagrangian relaxation in the order of falling prices: after every step
the choice is the best of all choices of its cost, proven by the price. Where a budget ends within a step, the damage
that the step would have bought in part is the gap between the best choice and what is found, at most; smaller steps
that still fit are then taken, which makes it smaller.

Where items are few (whole tensors) that gap can be worth something. Then a table over costs, rounded up to a fine grid,
finds the best choice but for the rounding (dynamic programming), and the better of the two is taken.

Sources: Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979); Kellerer, Pferschy
and Pisinger, "Knapsack Problems" (2004), chapter 11.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

#: Steps of the grid of costs, and most cells of the table over them.
GRID, TABLE = 20_000, 100_000_000


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Attributes:
        choice: int64 [items], an option for each item.
        cost, damage: sums over the items.
        bound: no choice within the budget has less damage than this.
    """

    choice: Choice
    cost: float
    damage: float
    bound: float


def solve(costs: Floats, damages: Floats, budget: float) -> Solution | None:
    """One option for each item, with the least damage that is found within the budget.

    Args:
        costs: float64 [items, options], not negative; infinite where an item must not take an option.
        damages: float64 [items, options], of any sign, finite where the cost is.
        budget: the choice never costs more.

    Returns:
        the solution; None where even the cheapest options cost too much.
    """
    steps, choice = _hulls(costs, damages)
    spent, damage = _sums(choice, costs, damages)
    slack = 1e-9 * max(budget, 1.0)  # costs are sums of floating point numbers
    if spent > budget + slack:
        return None
    bound, stopped = damage, False
    blocked: set[int] = set()
    for item, option, extra, saved in steps:
        fits = item not in blocked and spent + extra <= budget + slack
        if not stopped and not fits:
            bound, stopped = damage - saved * (budget - spent) / extra, True
        if fits:
            choice[item], spent, damage = option, spent + extra, damage - saved
        else:
            blocked.add(item)
    found = Solution(choice, *_sums(choice, costs, damages), damage if not stopped else bound)
    if stopped and len(costs) * costs.shape[1] * GRID <= TABLE:
        exact = _table(costs, damages, budget, found.bound)
        if exact is not None and exact.damage < found.damage:
            return exact
    return found


def _sums(choice: Choice, costs: Floats, damages: Floats) -> tuple[float, float]:
    items = np.arange(len(choice))
    return float(costs[items, choice].sum()), float(damages[items, choice].sum())


def _hulls(costs: Floats, damages: Floats) -> tuple[list[tuple[int, int, float, float]], Choice]:
    """The steps (item, option, more cost, less damage) along all hulls, the steepest first; where they begin."""
    steps: list[tuple[int, int, float, float]] = []
    begin = np.zeros(len(costs), dtype=np.int64)
    for item in range(len(costs)):
        hull = _hull(costs[item], damages[item])
        begin[item] = hull[0]
        for low, high in itertools.pairwise(hull):
            extra, saved = costs[item, high] - costs[item, low], damages[item, low] - damages[item, high]
            steps.append((item, high, float(extra), float(saved)))
    steps.sort(key=lambda step: -step[3] / step[2])  # stable: the steps of an item stay in order
    return steps, begin


def _hull(costs: Floats, damages: Floats) -> list[int]:
    """Options on the lower convex hull: the cheapest first, and each one better than those before it."""
    hull: list[int] = []
    for option in sorted(range(len(costs)), key=lambda each: (costs[each], damages[each])):
        if not np.isfinite(costs[option]) or (hull and damages[option] >= damages[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(hull[-2], option, costs, damages) <= _slope(hull[-2], hull[-1], costs, damages):
            hull.pop()
        hull.append(option)
    return hull


def _slope(low: int, high: int, costs: Floats, damages: Floats) -> float:
    return float((damages[high] - damages[low]) / (costs[high] - costs[low]))


def _table(costs: Floats, damages: Floats, budget: float, bound: float) -> Solution | None:
    """The best choice when every cost is rounded up to the grid (so that the budget still holds)."""
    cheapest = costs.min(axis=1)
    unit = (budget - float(cheapest.sum())) / GRID
    if unit <= 0:
        return None
    cells = np.ceil((costs - cheapest[:, None]) / unit - 1e-9)
    best = np.zeros(GRID + 1)
    taken = np.zeros((len(costs), GRID + 1), dtype=np.int8)
    for item in range(len(costs)):
        after = np.full(GRID + 1, np.inf)
        for option in range(costs.shape[1]):
            if cells[item, option] > GRID:
                continue
            shift = int(cells[item, option])
            reached = best[: GRID + 1 - shift] + damages[item, option]
            better = reached < after[shift:]
            after[shift:][better] = reached[better]
            taken[item, shift:][better] = option
        best = after
    choice, left = np.zeros(len(costs), dtype=np.int64), GRID
    for item in reversed(range(len(costs))):
        choice[item] = taken[item, left]
        left -= int(cells[item, choice[item]])
    return Solution(choice, *_sums(choice, costs, damages), bound)
