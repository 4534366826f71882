"""Tokens as people give them (lists, arrays, tensors) -> tokens as the engines take them, or one sentence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgerazor.errors import plain, usage_error

#: Tokens, one sequence.
Ids: TypeAlias = Sequence[int] | Tensor


def as_tensor(ids: Any) -> Tensor:
    """Tokens as int64, of the shape that they have.

    Raises:
        UserError: one of them is no whole number, or too large for one; or rows differ in length.
    """
    wrong = usage_error("Tokens are whole numbers, [T] or [B, T].")
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise wrong
        return ids.to(torch.int64)
    if isinstance(ids, np.ndarray):
        return as_tensor(torch.from_numpy(ids))
    try:
        rows = list(ids)
        nested = bool(rows) and not isinstance(rows[0], int)
        rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows] if nested else [rows]
    except TypeError:
        raise wrong from None
    flat = list(itertools.chain.from_iterable(rows))
    if not all(type(token) is int for token in flat) or len({len(row) for row in rows}) > 1:
        raise wrong
    for token in flat:
        if token.bit_length() > 63:
            raise usage_error(f"There is no token {plain(token, 50)}.")
    tokens = torch.tensor(flat, dtype=torch.int64)
    return tokens.reshape(len(rows), -1) if nested and flat else tokens


def as_list(ids: Ids) -> list[int]:
    """Tokens of one sequence as plain numbers.

    Raises:
        UserError: they are not tokens of one sequence.
    """
    tensor = as_tensor(ids)
    if tensor.dim() != 1:
        raise usage_error("Tokens of a sequence are whole numbers, [T].")
    tokens: list[int] = tensor.tolist()
    return tokens
