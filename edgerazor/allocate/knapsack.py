"""The multiple-choice knapsack: one option for every item, with the least total sensitivity that a budget allows.

Every item (a tensor, some rows) must take one of its options (formats), each with a cost (bits) and a sensitivity
(nats). Only options on the lower convex hull of an item's points (cost, sensitivity) can pay off at some price per bit.
Walking down all hulls at once, the steepest step first, is Lagrangian relaxation in the order of falling prices: after
every step the choice is the best of all choices of its cost, proven by the price. Where a budget ends within a step,
the choice is worse than the best one by no more than what the missing part of that step would have saved. Smaller steps
that still fit are then taken, which narrows this gap.

Where items are few (whole tensors) that gap can matter. Then dynamic programming over costs, rounded up to a fine grid,
finds the choice that is best but for the rounding, and the better of the two is taken.

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

#: Steps of the grid of costs, and most entries of the table of dynamic programming over them.
GRID, TABLE = 20_000, 100_000_000


@dataclass(frozen=True)
class Solution:
    """A choice within the budget.

    Attributes:
        choice: int64 [items], an option for each item.
        cost, sensitivity: sums over the items.
        bound: no choice within the budget has a smaller sum of sensitivities than this.
    """

    choice: Choice
    cost: float
    sensitivity: float
    bound: float


def solve(costs: Floats, sensitivities: Floats, budget: float) -> Solution | None:
    """One option for each item, with the least sum of sensitivities that is found within the budget.

    Args:
        costs: float64 [items, options], not negative; infinite where an item must not take an option.
        sensitivities: float64 [items, options], of any sign, finite where the cost is.
        budget: most that the choice may cost.

    Returns:
        The solution; None where even the cheapest options cost too much.
    """
    steps, choice = _hulls(costs, sensitivities)
    spent, sensitivity = _sums(choice, costs, sensitivities)
    slack = 1e-9 * max(budget, 1.0)  # costs are sums of floating point numbers
    if spent > budget + slack:
        return None
    bound, stopped = sensitivity, False
    blocked: set[int] = set()
    for item, option, extra, saved in steps:
        fits = item not in blocked and spent + extra <= budget + slack
        if not stopped and not fits:
            bound, stopped = sensitivity - saved * (budget - spent) / extra, True
        if fits:
            choice[item], spent, sensitivity = option, spent + extra, sensitivity - saved
        else:
            blocked.add(item)
    greedy = Solution(choice, *_sums(choice, costs, sensitivities), sensitivity if not stopped else bound)
    if stopped and len(costs) * costs.shape[1] * GRID <= TABLE:
        exact = _dynamic_programming(costs, sensitivities, budget, greedy.bound)
        if exact is not None and exact.sensitivity < greedy.sensitivity:
            return exact
    return greedy


def _sums(choice: Choice, costs: Floats, sensitivities: Floats) -> tuple[float, float]:
    """The cost and the sensitivity of a choice."""
    items = np.arange(len(choice))
    return float(costs[items, choice].sum()), float(sensitivities[items, choice].sum())


def _hulls(costs: Floats, sensitivities: Floats) -> tuple[list[tuple[int, int, float, float]], Choice]:
    """The steps (item, option, more cost, less sensitivity) along all hulls, the steepest first; the choice before."""
    steps: list[tuple[int, int, float, float]] = []
    cheapest = np.zeros(len(costs), dtype=np.int64)
    for item in range(len(costs)):
        hull = _hull(costs[item], sensitivities[item])
        cheapest[item] = hull[0]
        for low, high in itertools.pairwise(hull):
            extra, saved = costs[item, high] - costs[item, low], sensitivities[item, low] - sensitivities[item, high]
            steps.append((item, high, float(extra), float(saved)))
    steps.sort(key=lambda step: -step[3] / step[2])  # stable: the steps of an item stay in order
    return steps, cheapest


def _hull(costs: Floats, sensitivities: Floats) -> list[int]:
    """Options on the lower convex hull: the cheapest first, and each one better than those before it."""
    hull: list[int] = []
    for option in sorted(range(len(costs)), key=lambda index: (costs[index], sensitivities[index])):
        if not np.isfinite(costs[option]) or (hull and sensitivities[option] >= sensitivities[hull[-1]]):
            continue
        while len(hull) > 1:
            before, last = hull[-2:]
            if _slope(before, option, costs, sensitivities) > _slope(before, last, costs, sensitivities):
                break
            hull.pop()
        hull.append(option)
    return hull


def _slope(low: int, high: int, costs: Floats, sensitivities: Floats) -> float:
    """Change of sensitivity per cost from one option to another."""
    return float((sensitivities[high] - sensitivities[low]) / (costs[high] - costs[low]))


def _dynamic_programming(costs: Floats, sensitivities: Floats, budget: float, bound: float) -> Solution | None:
    """The best choice when every cost is rounded up to the grid, so that the budget still holds."""
    cheapest = costs.min(axis=1)
    unit = (budget - float(cheapest.sum())) / GRID
    if unit <= 0:
        return None
    units = np.ceil((costs - cheapest[:, None]) / unit - 1e-9)
    best = np.zeros(GRID + 1)
    taken = np.zeros((len(costs), GRID + 1), dtype=np.int8)
    for item in range(len(costs)):
        after = np.full(GRID + 1, np.inf)
        for option in range(costs.shape[1]):
            if units[item, option] > GRID:
                continue
            shift = int(units[item, option])
            reached = best[: GRID + 1 - shift] + sensitivities[item, option]
            better = reached < after[shift:]
            after[shift:][better] = reached[better]
            taken[item, shift:][better] = option
        best = after
    choice, left = np.zeros(len(costs), dtype=np.int64), GRID
    for item in reversed(range(len(costs))):
        choice[item] = taken[item, left]
        left -= int(units[item, choice[item]])
    return Solution(choice, *_sums(choice, costs, sensitivities), bound)
