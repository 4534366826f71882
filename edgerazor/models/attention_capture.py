"""Attention capture: queries, keys and values of chosen decoder layers, taken where they enter attention.

That is behind the rotary embedding and any norm or rounding, and before grouped heads are repeated. transformers calls
attention through an exchangeable function (`AttentionInterface`), the same for every family. So one function that
captures its arguments and calls the family's own attention serves all of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from edgerazor.errors import UserError
from edgerazor.losses import Attention
from edgerazor.models.loading import caps_attention, sees
from edgerazor.models.structure import Structure

ADVICE = "Leave out the losses that look at attention, or name layers that have it: `layers: [1, 3]`."

#: Attention module -> function that is called with its attention and output, while they are captured.
_captures: dict[nn.Module, Callable[[Attention, Tensor], None]] = {}


def attention_forward(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A family's own attention, whose arguments and output `capture_attention` may capture.

    Args:
        base: "sdpa" (torch's fused attention) or "eager" (the family's own).
        module: the attention module.
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv heads, tokens, head_dim].
        value: [batch, kv heads, tokens, head_dim].
        attention_mask: what the family's model made for it, bool or additive.
        args: further arguments of the attention, like `kwargs`.
        kwargs: `scaling`, `softcap` and others.
    """
    function = sdpa_attention_forward
    if base == "eager":  # each family has its own, beside its attention class
        function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    output = function(module, query, key, value, attention_mask, *args, **kwargs)
    if module in _captures:
        scale = kwargs.get("scaling")
        attention = Attention(
            query,
            key,
            value,
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            kwargs.get("softcap"),
            visible(attention_mask),
        )
        _captures[module](attention, output[0])
    return output


def visible(mask: Tensor | None) -> Tensor | None:
    """A mask of transformers as bool, true where a query may attend to a key; additive masks hide by huge numbers."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def attention_base(model: PreTrainedModel) -> str:
    """Which attention a model is computed with: "eager" where scores are capped or it was loaded so, else "sdpa"."""
    eager = model.config.get_text_config()._attn_implementation == "eager" or caps_attention(model.config)
    return "eager" if eager else "sdpa"


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text; all of one that reads nothing else."""
    return model.get_decoder() if sees(model.config) else model


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let every module of a model call the attention function that is registered as `name`, in place.

    Of a model that sees, the modules of its decoder: towers are not quantized, and have an attention of their own.
    """
    for module in _decoder(model).modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def register_attention(name: str, base: str, function: Callable[..., Any]) -> None:
    """Register an attention function under a name for `set_attention`, with the masks that go with its base."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask if base == "sdpa" else eager_mask)


def has_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the attention of a model goes through `AttentionInterface`."""
    return hasattr(sys.modules[type(_decoder(model)).__module__], "ALL_ATTENTION_FUNCTIONS")


def enable_attention_capture(model: PreTrainedModel) -> None:
    """Let a model call an attention that can be captured, in place and for good; it computes the same numbers.

    Raises:
        UserError: transformers has no exchangeable attention for it.
    """
    if not has_attention_interface(model):
        raise UserError(
            f"The attention of {type(model).__name__} cannot be looked at, because transformers has no exchangeable "
            "attention for it.",
            ADVICE,
        )
    if not model.config.get_text_config()._attn_implementation.startswith("edgerazor_"):  # ours can be captured already
        set_attention(model, f"edgerazor_seen_{attention_base(model)}")


def check_attention_capture(model: PreTrainedModel, structure: Structure, layers: Collection[int]) -> None:
    """Make sure that losses can compute the attention maps of a model from what is captured.

    Args:
        model: after `enable_attention_capture`; computes a few tokens.
        structure: where its layers are.
        layers: the layers whose attention will be captured, counted from 1.

    Raises:
        UserError: the attention of a layer cannot be captured, or it is more than the softmax of queries and keys
            (sinks, biases).
    """
    family = type(model).__name__
    for layer, problem in _problems(model, structure, layers).items():
        raise UserError(f"The attention of layer {layer} of {family} {problem}.", ADVICE)


@torch.no_grad()
def _problems(model: PreTrainedModel, structure: Structure, layers: Collection[int]) -> dict[int, str]:
    """Layer -> why its attention cannot be used: maps of the captured tensors must give its output for a few tokens."""
    outputs: dict[int, Tensor] = {}
    ids = torch.arange(1, 6, device=model.device)[None]
    with capture_attention(model, structure, layers, ("query", "key", "value"), outputs) as captured:
        model(input_ids=ids, use_cache=False)
    problems = {}
    for layer in sorted(layers):
        if layer not in captured:
            problems[layer] = "cannot be looked at"
        elif not _explains(captured[layer], outputs[layer]):
            problems[layer] = "is not made of queries and keys alone"
    return problems


def _explains(attention: Attention, output: Tensor) -> bool:
    """Whether `softmax(scores) value` equals the output of attention, [batch, tokens, heads, d], but for rounding."""
    assert attention.query is not None
    assert attention.key is not None
    assert attention.value is not None
    groups = attention.query.shape[1] // attention.key.shape[1]
    key, value = (heads.float().repeat_interleave(groups, 1) for heads in (attention.key, attention.value))
    scores = attention.query.float() @ key.mT * attention.scale
    if attention.cap is not None:
        scores = attention.cap * torch.tanh(scores / attention.cap)
    rows = torch.arange(scores.shape[2], device=scores.device)
    scores = scores.masked_fill(~attention.allowed(0, rows, scores.shape[3]), float("-inf"))
    expected = (torch.softmax(scores, -1) @ value).transpose(1, 2)  # [B, T, heads, d']
    tolerance = 0.05 if output.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return output.shape == expected.shape and bool((expected - output).norm() <= tolerance * expected.norm())


@contextlib.contextmanager
def capture_attention(
    model: nn.Module,
    structure: Structure,
    layers: Iterable[int],
    parts: Collection[str],
    outputs: dict[int, Tensor] | None = None,
) -> Iterator[dict[int, Attention]]:
    """Capture the inputs of the attention of layers, counted from 1, in a mapping during forward passes inside.

    With gradient checkpointing (not the reentrant kind) the gradient flows through the captured tensors: a layer is
    computed again in backward, outside this context, and nothing is captured twice.

    Args:
        model: after `enable_attention_capture`.
        structure: where its layers are.
        layers: whose attention to capture.
        parts: which of "query", "key" and "value" are captured; the rest is None.
        outputs: also filled, with the outputs of attention [batch, tokens, heads, head_dim].
    """
    captured: dict[int, Attention] = {}
    blocks: Any = model.get_submodule(structure.layers_path)

    def capture(layer: int) -> Callable[[Attention, Tensor], None]:
        def store(attention: Attention, output: Tensor) -> None:
            for part in {"query", "key", "value"} - set(parts):
                setattr(attention, part, None)
            captured[layer] = attention
            if outputs is not None:
                outputs[layer] = output

        return store

    captures = {module: capture(layer) for layer in set(layers) for module in blocks[layer - 1].modules()}
    _captures.update(captures)
    try:
        yield captured
    finally:
        for module in captures:
            del _captures[module]


for _base in ("sdpa", "eager"):

    def _capturable(*args: Any, base: str = _base, **kwargs: Any) -> Any:
        return attention_forward(base, *args, **kwargs)

    register_attention(f"edgerazor_seen_{_base}", _base, _capturable)
