"""Which floating dtypes hold given numbers exactly."""

from __future__ import annotations

import torch
from torch import Tensor

#: The dtypes of unquantized weights, the preferred first. Every weight of ours is exact in the last: a code of at most
#: eight bits times a float16 scale has at most 19 significant bits.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def holds(dtype: torch.dtype, numbers: Tensor) -> bool:
    """Whether every one of the numbers (any floating dtype) is a number of the dtype."""
    return torch.equal(numbers.to(dtype).to(numbers.dtype), numbers)


def smallest_float(numbers: Tensor) -> torch.dtype:
    """The first of `FLOATS` that holds all numbers, float32 or narrower, exactly."""
    return next(dtype for dtype in FLOATS if dtype == torch.float32 or holds(dtype, numbers))
