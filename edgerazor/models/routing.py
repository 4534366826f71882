"""What the routers of a mixture of experts say of each token, captured where it leaves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from edgerazor.families import experts_per_token
from edgerazor.losses import Routing
from edgerazor.models.structure import Structure


@contextlib.contextmanager
def capture_routing(model: Any, structure: Structure) -> Iterator[dict[int, Routing]]:
    """Capture what all routers say in a mapping, layer (counted from 1) -> routing, during a forward pass inside.

    With gradient checkpointing (not the reentrant kind) the gradient flows through the captured logits: a layer is
    computed again in backward, outside this context.

    Args:
        model: a mixture of experts.
        structure: where its routers are.
    """
    captured: dict[int, Routing] = {}
    shape: list[int] = []
    usual = experts_per_token(model.config.get_text_config()) or 1

    def note_shape(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def capture(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            parts: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
            logits = parts[0].reshape(*shape, -1)  # [B, T, E]
            chosen = parts[-1].reshape(*shape, -1) if len(parts) > 1 else logits.topk(usual, dim=-1).indices
            captured[layer] = Routing(logits, chosen)

        return hook

    blocks: Any = model.get_submodule(structure.layers_path)
    handles = []
    for listed in structure.experts:
        index = int(listed.path.removeprefix(f"{structure.layers_path}.").partition(".")[0])
        routers = [model.get_submodule(path) for path in listed.routers]
        for router in routers:
            if router.weight.shape[0] == listed.size:
                handles.append(router.register_forward_hook(capture(index + 1)))
                handles.append(blocks[index].register_forward_pre_hook(note_shape, with_kwargs=True))
                break
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
