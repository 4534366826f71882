"""The knapsack against all choices there are: never above the budget, and how far from the best it can be."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from edgerazor.allocate import Solution, knapsack, solve
from edgerazor.allocate.knapsack import GRID

Instance = tuple[np.ndarray, np.ndarray]


def all_choices(costs: np.ndarray, sensitivities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost and sensitivity of each choice that is allowed, by enumeration."""
    choices = np.array(list(itertools.product(*([range(costs.shape[1])] * len(costs)))))
    items = np.arange(len(costs))
    cost, sensitivity = costs[items, choices].sum(1), sensitivities[items, choices].sum(1)
    allowed = np.isfinite(cost)
    return cost[allowed], sensitivity[allowed]


def optimum(costs: np.ndarray, sensitivities: np.ndarray, budget: float) -> float:
    """The least sensitivity within the budget; infinite where nothing fits."""
    cost, sensitivity = all_choices(costs, sensitivities)
    fits = cost <= budget + 1e-9 * max(budget, 1.0)
    return float(sensitivity[fits].min(initial=np.inf))


def check_solution(solution: Solution, costs: np.ndarray, sensitivities: np.ndarray, budget: float) -> None:
    """What holds of every solution: it is what it says it is, and its budget holds."""
    items = np.arange(len(costs))
    assert solution.choice.shape == (len(costs),)
    assert solution.cost == pytest.approx(costs[items, solution.choice].sum())
    assert solution.sensitivity == pytest.approx(sensitivities[items, solution.choice].sum())
    assert np.isfinite(solution.cost)
    assert solution.cost <= budget + 1e-9 * max(budget, 1.0)


def instance(seed: int, whole: bool = False) -> Instance:
    """3 to 6 items with 2 to 4 options: costs grow, sensitivities mostly fall, but not always; some are forbidden."""
    draw = np.random.default_rng(seed)
    shape = (int(draw.integers(3, 7)), int(draw.integers(2, 5)))
    sizes = draw.integers(1, 9, (shape[0], 1))
    widths = np.sort(draw.choice(np.arange(1, 9), shape[1], replace=False)) if whole else np.sort(draw.random(shape[1]))
    costs = (sizes * widths).astype(np.float64)
    sensitivities = draw.random((shape[0], 1)) * 4.0 ** -draw.permuted(np.arange(shape[1]) * draw.random())
    sensitivities = sensitivities * (1 + 0.3 * draw.standard_normal(shape)) - (seed % 3 == 0) * 0.2 * draw.random(shape)
    if seed % 4 == 1:  # one option of each item stays
        forbidden = draw.random(shape) < 0.3
        forbidden[np.arange(shape[0]), draw.integers(0, shape[1], shape[0])] = False
        costs[forbidden] = np.inf
    return costs, sensitivities


def budgets(costs: np.ndarray, seed: int) -> list[float]:
    """Between the cheapest choice and more than the dearest."""
    least = float(costs.min(axis=1).sum())
    most = float(np.where(np.isfinite(costs), costs, 0.0).max(axis=1).sum())
    return [least, *(least + share * (most - least) for share in np.random.default_rng(seed).random(3)), 1.1 * most + 1]


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_small_instances_against_all_their_choices(start: int) -> None:
    for seed in range(start, start + 50):
        costs, sensitivities = instance(seed)
        for budget in budgets(costs, seed):
            solution = solve(costs, sensitivities, budget)
            assert solution is not None
            check_solution(solution, costs, sensitivities, budget)
            best = optimum(costs, sensitivities, budget)
            assert solution.bound <= best + 1e-9
            assert best <= solution.sensitivity + 1e-9
            # The table rounds the cost of each item up by less than a cell: a budget smaller by so much is solved.
            cell = (budget - costs.min(axis=1).sum()) / GRID
            assert solution.sensitivity <= optimum(costs, sensitivities, budget - len(costs) * cell) + 1e-9


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_whole_costs_and_budgets_are_solved_exactly(start: int) -> None:
    """Of a budget that the grid divides, nothing is lost to rounding."""
    for seed in range(start, start + 50):
        costs, sensitivities = instance(seed, whole=True)
        least = costs.min(axis=1).sum()
        for more in (1, 2, 4, 5, 8, 10, 16, 20, 25, 40):  # divisors of the grid: a cost is a whole number of cells
            solution = solve(costs, sensitivities, float(least + more))
            assert solution is not None
            check_solution(solution, costs, sensitivities, float(least + more))
            assert solution.sensitivity == pytest.approx(optimum(costs, sensitivities, float(least + more)), abs=1e-9)


def test_at_the_corners_of_the_hull_no_table_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the steepest steps use the budget up, and price proves them: bound and sensitivity are one."""
    monkeypatch.setattr(knapsack, "TABLE", 0)
    for seed in range(100):
        costs, sensitivities = instance(seed)
        steps, choice = knapsack._hulls(costs, sensitivities)
        corners = [float(costs[np.arange(len(costs)), choice].sum())]
        for _, _, extra, _ in steps:
            corners.append(corners[-1] + extra)
        for budget in corners:
            solution = solve(costs, sensitivities, budget)
            assert solution is not None
            check_solution(solution, costs, sensitivities, budget)
            assert solution.sensitivity == pytest.approx(optimum(costs, sensitivities, budget), abs=1e-9)
            assert solution.bound == pytest.approx(solution.sensitivity, abs=1e-9)


def test_without_the_table_the_gap_is_at_most_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "TABLE", 0)
    for seed in range(100):
        costs, sensitivities = instance(seed)
        largest = max((saved for _, _, _, saved in knapsack._hulls(costs, sensitivities)[0]), default=0.0)
        for budget in budgets(costs, seed):
            solution = solve(costs, sensitivities, budget)
            assert solution is not None
            check_solution(solution, costs, sensitivities, budget)
            best = optimum(costs, sensitivities, budget)
            assert solution.bound - 1e-9 <= best <= solution.sensitivity + 1e-9
            assert solution.sensitivity - solution.bound <= largest + 1e-9


def test_the_table_finds_what_the_steps_do_not() -> None:
    """The steepest step first (item 0, 3 saved for 2) leaves no room for the two others, which save 4 for 3."""
    costs, sensitivities = np.array([[0.0, 2.0], [0.0, 3.0]]), np.array([[3.0, 0.0], [4.0, 0.0]])
    solution = solve(costs, sensitivities, 3.0)
    assert solution is not None
    assert solution.choice.tolist() == [0, 1]
    assert (solution.cost, solution.sensitivity) == (3.0, 3.0)
    assert solution.bound == pytest.approx(4 - 4 / 3)  # a third of the second step


def test_what_costs_too_much_is_none() -> None:
    costs, sensitivities = np.array([[1.0, 2.0], [3.0, np.inf]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    assert solve(costs, sensitivities, 3.99) is None
    solution = solve(costs, sensitivities, 4.0)
    assert solution is not None
    assert solution.choice.tolist() == [0, 0]
    assert solve(np.array([[np.inf, 2.0]]), np.array([[0.0, 1.0]]), 1.5) is None


def test_a_dearer_option_that_is_no_better_is_never_taken() -> None:
    costs, sensitivities = (
        np.array([[1.0, 2.0, 4.0]] * 3),
        np.array([[1.0, 1.0, 2.0], [-1.0, 0.0, -1.0], [2.0, 3.0, 1.0]]),
    )
    solution = solve(costs, sensitivities, 100.0)
    assert solution is not None
    assert solution.choice.tolist() == [0, 0, 2]
    assert solution.bound == solution.sensitivity == 1.0


def test_sensitivities_below_zero_count() -> None:
    costs, sensitivities = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[0.0, -1.0], [-3.0, -3.5]])
    solution = solve(costs, sensitivities, 3.0)
    assert solution is not None
    assert solution.choice.tolist() == [1, 0]
    assert solution.sensitivity == solution.bound == -4.0


def test_thousands_of_equal_items_in_under_a_second() -> None:
    count = 20_000
    costs, sensitivities = np.tile([1.58, 2.0, 3.0, 4.0], (count, 1)), np.tile([1.0, 0.6, 0.2, 0.05], (count, 1))
    began = time.process_time()
    solution = solve(costs, sensitivities, 2.5 * count)
    assert time.process_time() - began < 1.0
    assert solution is not None
    check_solution(solution, costs, sensitivities, 2.5 * count)
    assert solution.sensitivity - solution.bound <= 0.4 + 1e-9
    # Of the hull's corners next to 2.5 bits, the mixture: half the items at 2 bits, half at 3.
    assert solution.bound == pytest.approx(0.4 * count)


def test_equal_instances_have_equal_solutions() -> None:
    costs, sensitivities = instance(7)
    one, other = solve(costs, sensitivities, 9.0), solve(costs.copy(), sensitivities.copy(), 9.0)
    assert one is not None
    assert other is not None
    assert one.choice.tolist() == other.choice.tolist()
    assert (one.cost, one.sensitivity, one.bound) == (other.cost, other.sensitivity, other.bound)
