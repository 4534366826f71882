"""Which bytes of a packed mixture of experts a token reads: of each layer's experts only the chosen ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgerazor.families import experts_per_token
from edgerazor.packed import PackedModel

#: Path of an expert's matrix: list of experts, number.
IN_EXPERT = re.compile(r"(.+\bexperts)\.(\d+)\..+")


def packed_sizes(packed: PackedModel) -> dict[str, int]:
    """Path of each matrix -> bytes of its codes, scales and format indices."""
    entries = packed.header.matrices.items()
    return {name: packed.spec(name).packed_bytes((entry.shape[0], entry.shape[1])) for name, entry in entries}


def unchosen_bytes(sizes: Mapping[str, int], config: Any) -> int:
    """Bytes of the experts that a token is not sent to, on average over the experts of a layer; 0 in a dense model.

    Args:
        sizes: path of each matrix -> its bytes.
        config: of the language model.
    """
    chosen = experts_per_token(config)
    if chosen is None:
        return 0
    lists: dict[str, int] = {}
    numbers: dict[str, set[str]] = {}
    for name, size in sizes.items():
        if place := IN_EXPERT.fullmatch(name):
            lists[place[1]] = lists.get(place[1], 0) + size
            numbers.setdefault(place[1], set()).add(place[2])
    return round(sum(size * max(1 - chosen / len(numbers[path]), 0) for path, size in lists.items()))
