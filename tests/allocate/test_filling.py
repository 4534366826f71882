"""The search for the most that fits: never more than asked for, everything where there is room for it."""

from __future__ import annotations

import pytest

from edgerazor.allocate.filling import SEARCH, fill
from edgerazor.errors import UserError, usage_error


def steps(amount: float) -> float:
    """A plan is its amount here."""
    return amount


def size(amount: float) -> int:
    """In steps of 7 bytes, and 100 before anything."""
    return 100 + 7 * int(amount)


def too_small(smallest: int) -> UserError:
    return usage_error(f"It is not less than {smallest}.")


@pytest.mark.parametrize("limit", [100, 101, 107, 555, 799, 800])
def test_what_is_found_fits_and_one_step_more_would_not(limit: int) -> None:
    amount = fill(steps, (0.0, 100.0), size, limit, too_small)
    assert size(amount) <= limit
    assert size(amount) == 800 or size(amount + 1) > limit


def test_all_of_it_where_there_is_room() -> None:
    assert fill(steps, (2.0, 8.0), size, 10_000, too_small) == 8.0


def test_nothing_where_the_least_is_too_large() -> None:
    with pytest.raises(UserError, match="not less than 114"):
        fill(steps, (2.0, 8.0), size, 113, too_small)


def test_no_more_is_looked_at_than_it_takes() -> None:
    looked: list[float] = []

    def looking(amount: float) -> float:
        looked.append(amount)
        return amount

    amount = fill(looking, (0.0, 100.0), size, 450, too_small, tolerance=0.1)
    assert 0.9 * 450 <= size(amount) <= 450
    assert looked == [0.0, 100.0, 50.0]
    looked.clear()
    fill(looking, (0.0, 100.0), size, 451, too_small)
    assert len(looked) == SEARCH
