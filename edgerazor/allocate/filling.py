"""Bisection for the largest amount that fits a limit of bytes, where only a whole plan tells how many it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from edgerazor.errors import UserError

#: Most plans that are made.
SEARCH = 20

PlanT = TypeVar("PlanT")


def fill(
    plan_at: Callable[[float], PlanT],
    bounds: tuple[float, float],
    bytes_of: Callable[[PlanT], int],
    limit: int,
    too_small: Callable[[int], UserError],
    tolerance: float = 0.0,
) -> PlanT:
    """The plan of the largest amount (of bits, of bytes of codes) whose size is within the limit.

    Args:
        plan_at: amount -> a plan, or what a plan is made from; larger for a larger amount, by and large.
        bounds: the least and the largest amount.
        bytes_of: the size of such a plan.
        limit: the most bytes.
        too_small: the error to raise where even the least amount takes more than the limit, from the bytes it takes.
        tolerance: share of the limit that may stay unused; the search ends as soon as no more does.

    Returns:
        The plan of the largest amount that was found to fit.

    Raises:
        UserError: not even the plan of the least amount fits.
    """
    low, high = bounds
    best = plan_at(low)
    size = bytes_of(best)
    if size > limit:
        raise too_small(size)
    amount = high
    for _ in range(SEARCH - 1):
        if low >= high or limit * (1 - tolerance) <= size <= limit:
            break
        candidate = plan_at(amount)
        size = bytes_of(candidate)
        if size <= limit:
            low, best = amount, candidate
        else:
            high = amount
        amount = (low + high) / 2
    return best
