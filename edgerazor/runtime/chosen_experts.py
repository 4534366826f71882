"""Which bytes of a packed mixture of experts a token reads: of each layer's experts only the chosen ones."""

from __future__ import annotations

import re
from typing import Any

from edgerazor.packed import PackedModel

#: Path of an expert's matrix: list of experts, number.
IN_EXPERT = re.compile(r"(.+\bexperts)\.(\d+)\..+")


def unchosen_bytes(packed: PackedModel, config: Any) -> int:
    """Bytes of the experts that a token is not sent to, on average over the experts of a layer; 0 in a dense model.

    Args:
        packed: the packed model.
        config: of its language model.
    """
    chosen = getattr(config, "num_experts_per_tok", None)
    if not isinstance(chosen, int):
        return 0
    sizes: dict[str, float] = {}
    numbers: dict[str, set[str]] = {}
    for name, entry in packed.header.matrices.items():
        if place := IN_EXPERT.fullmatch(name):
            size = packed.spec(name).packed_bytes((entry.shape[0], entry.shape[1]))
            sizes[place[1]] = sizes.get(place[1], 0.0) + size
            numbers.setdefault(place[1], set()).add(place[2])
    return round(sum(size * max(1 - chosen / len(numbers[path]), 0) for path, size in sizes.items()))
