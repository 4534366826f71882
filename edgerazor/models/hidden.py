"""Hidden states of chosen decoder layers, taken where they leave the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from edgerazor.models.structure import Structure


@contextlib.contextmanager
def capture_hidden(model: nn.Module, found: Structure, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Fill a mapping with hidden states [B, T, H] during forward passes inside.

    Key 0 is what enters the first layer (the embedding's output), key l what leaves layer l, counted from 1.
    transformers' own `output_hidden_states` differs: its last entry is behind the final norm.
    """
    states: dict[int, Tensor] = {}
    blocks: Any = model.get_submodule(found.layers_path)

    def entering(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states[0] = args[0] if args else kwargs["hidden_states"]

    def leaving(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    for layer in sorted(set(layers)):
        if layer == 0:
            handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
        else:
            handles.append(blocks[layer - 1].register_forward_hook(leaving(layer)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
