"""Which decoder layers a loss looks at: numbers counted from 1, or names that the model's depth turns into numbers."""

from __future__ import annotations

from collections.abc import Callable

from edgerazor.errors import usage_error

#: name -> layer of a model with so many layers (EdgeRazor's fixed choices are the first three).
NAMED: dict[str, Callable[[int], int]] = {
    "low": lambda count: 1,
    "mid": lambda count: (count + 1) // 2,
    "high": lambda count: count,
    "last": lambda count: count,
}

Layers = tuple[int | str, ...]


def layers_option(layers: object) -> Layers | None:
    """A recipe's `layers`: "all" gives None; a number, a name or a list of them gives a tuple.

    Raises:
        UserError: it is something else.
    """
    if layers == "all":
        return None
    entries = tuple(layers) if isinstance(layers, tuple | list) else (layers,)
    if not entries or not all(entry in NAMED if isinstance(entry, str) else _is_layer(entry) for entry in entries):
        raise usage_error(
            f"The loss option layers is {layers!r}; it must be 'all' or a list of layers, counted from 1 or called "
            f"{', '.join(NAMED)}."
        )
    return entries


def numbered(layers: Layers | None, count: int) -> tuple[int, ...]:
    """Layer numbers, ascending, in a model with `count` layers; None means all of them."""
    if layers is None:
        return tuple(range(1, count + 1))
    return tuple(sorted({NAMED[layer](count) if isinstance(layer, str) else layer for layer in layers}))


def fixed(layers: Layers | None) -> tuple[int, ...]:
    """The numbers, where they do not depend on the model's depth; empty where they do."""
    if layers is None or any(isinstance(layer, str) for layer in layers):
        return ()
    return numbered(layers, 0)


def _is_layer(entry: object) -> bool:
    return type(entry) is int and entry > 0
