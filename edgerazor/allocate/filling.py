"""The most that fits into so many bytes, where only a whole plan tells how many it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from edgerazor.errors import UserError

#: Plans that are looked at.
SEARCH = 20

Found = TypeVar("Found")


def fill(
    at: Callable[[float], Found],
    between: tuple[float, float],
    size_of: Callable[[Found], int],
    limit: int,
    refused: Callable[[int], UserError],
    close: float = 0.0,
) -> Found:
    """Bisection for the largest amount (of bits, of bytes of codes) whose plan is not larger than asked for.

    Args:
        at: amount -> a plan, or what makes one; larger for more, by and large.
        between: the least and the largest amount.
        size_of: bytes of such a plan.
        limit: the most bytes.
        refused: what to say where even the least amount takes more, from the bytes of that.
        close: share of them that may stay unused, where looking for more is not worth it.

    Returns:
        the last plan that fits.

    Raises:
        UserError: not even that of the least amount fits.
    """
    low, high = between
    best = at(low)
    size = size_of(best)
    if size > limit:
        raise refused(size)
    amount = high
    for _ in range(SEARCH - 1):
        if low >= high or limit * (1 - close) <= size <= limit:
            break
        found = at(amount)
        size = size_of(found)
        if size <= limit:
            low, best = amount, found
        else:
            high = amount
        amount = (low + high) / 2
    return best
