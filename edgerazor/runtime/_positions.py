"""How many positions a model has."""

from __future__ import annotations

from typing import Any

#: Where the configuration does not say.
ENDLESS = 1 << 30
#: Kinds of rotary embeddings whose factor the configuration's positions do not include.
_STRETCHED = ("linear", "dynamic", "yarn")


def max_positions(config: Any) -> int:
    """Tokens that a sequence can have, by the configuration of a text model.

    Rotary embeddings that stretch positions by a factor count from the positions before that.
    """
    most: int = getattr(config, "max_position_embeddings", None) or ENDLESS
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _STRETCHED and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or most
        return max(most, int(original * rope["factor"]))
    return most
