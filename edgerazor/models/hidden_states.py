"""Hidden states of chosen decoder layers, captured where they leave the layers, and the inputs of the head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor.errors import UserError
from edgerazor.losses import Head
from edgerazor.models.structure import Structure


@contextlib.contextmanager
def capture_hidden(model: nn.Module, structure: Structure, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Capture hidden states [B, T, H] in a mapping during forward passes inside the block.

    Key 0 holds the inputs of the first layer (the embedding's output), key l the outputs of layer l, counted from 1.
    transformers' own `output_hidden_states` differs: its last entry is behind the final norm.
    """
    states: dict[int, Tensor] = {}
    blocks: Any = model.get_submodule(structure.layers_path)

    def capture_input(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states[0] = args[0] if args else kwargs["hidden_states"]

    def capture_output(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    for layer in sorted(set(layers)):
        if layer == 0:
            handles.append(blocks[0].register_forward_pre_hook(capture_input, with_kwargs=True))
        else:
            handles.append(blocks[layer - 1].register_forward_hook(capture_output(layer)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def final_states(model: nn.Module, head_path: str) -> Iterator[list[Tensor]]:
    """Capture the inputs of the head, [B, T, H], in a list during forward passes inside the block.

    No logits are computed, so the model's own output has no meaning inside.
    """
    head = model.get_submodule(head_path)
    states: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0])

    # before what DeepSpeed does to the inputs of a module, whose outputs it then waits for in the backward pass
    hook = head.register_forward_pre_hook(capture, prepend=True)
    head.forward = lambda x: x[..., :1]  # what follows (caps, scales, casts) gets something small to work on
    try:
        yield states
    finally:
        hook.remove()
        del head.forward


#: Largest difference between computed logits and the model's own, as a share of the largest logit: bfloat16's error.
LOGIT_TOLERANCE = 0.02


@torch.no_grad()
def logit_shape(model: PreTrainedModel, head_path: str) -> tuple[float, float | None]:
    """What a family does to the output of the head: the factor of the logits, and their cap or None.

    Cohere multiplies (`logit_scale`), Granite divides (`logits_scaling`), Gemma 2 caps (`final_logit_softcapping`).

    Args:
        model: as it was loaded; computes a few tokens.
        head_path: path of its head.

    Raises:
        UserError: factor and cap do not give the model's own logits from its hidden states.
    """
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    shape = scale, None if cap is None else float(cap)
    ids = torch.arange(1, 6, device=model.device)[None]
    own = model(input_ids=ids, use_cache=False).logits[0].float()  # [5, V]
    with final_states(model, head_path) as states:
        model(input_ids=ids, use_cache=False)
    head = model.get_submodule(head_path)
    computed = Head(head.weight, head.bias, *shape).logits(states[0][0])
    if (computed - own).abs().max() > LOGIT_TOLERANCE * own.abs().max():
        raise UserError(
            f"{type(model).__name__} changes its logits in a way that is not understood, so no loss can be computed "
            "from its hidden states.",
            "Round it without training: `edgerazor pack MODEL`.",
        )
    return shape
