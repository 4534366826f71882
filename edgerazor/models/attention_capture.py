"""Queries, keys and values of chosen decoder layers, taken where they enter attention.

That is behind the rotary embedding and any norm or rounding, and before grouped heads are repeated. transformers calls
attention through an exchangeable function (`AttentionInterface`), the same for every family, so one function that looks
at its arguments and calls the family's own serves all of them.
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
from edgerazor.models.loading import caps_attention
from edgerazor.models.structure import Structure

ADVICE = "Leave out the losses that look at attention, or name layers that have it: `layers: [1, 3]`."

#: What looks at the attention of a module, while somebody looks; called with the attention and its output.
_watchers: dict[nn.Module, Callable[[Attention, Tensor], None]] = {}


def attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A family's own attention, which a capture may look at.

    Args:
        base: "sdpa" or "eager".
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
    if module in _watchers:
        scale = kwargs.get("scaling")
        seen = Attention(
            query,
            key,
            value,
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            kwargs.get("softcap"),
            visible(attention_mask),
        )
        _watchers[module](seen, output[0])
    return output


def visible(mask: Tensor | None) -> Tensor | None:
    """A mask of transformers as bool, true where a query may look at a key; additive ones hide by huge numbers."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def attention_base(model: PreTrainedModel) -> str:
    """Which attention a model is computed with: "eager" where scores are capped or it was loaded so, else "sdpa"."""
    eager = model.config._attn_implementation == "eager" or caps_attention(model.config)
    return "eager" if eager else "sdpa"


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let every module of a model call the attention function registered as `name`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def register_attention(name: str, base: str, function: Callable[..., Any]) -> None:
    """Offer an attention function to `use_attention`, with the masks that go with its base."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask if base == "sdpa" else eager_mask)


def exchangeable_attention(model: PreTrainedModel) -> bool:
    """Whether the attention of a model goes through `AttentionInterface`."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def open_attention(model: PreTrainedModel) -> None:
    """Make a model's attention one that can be looked at, for good; it computes the same.

    Raises:
        UserError: transformers has no exchangeable attention for it.
    """
    if not exchangeable_attention(model):
        raise UserError(
            f"The attention of {type(model).__name__} cannot be looked at, because transformers has no exchangeable "
            "attention for it.",
            ADVICE,
        )
    if not model.config._attn_implementation.startswith("edgerazor_"):  # ours can be looked at already
        use_attention(model, f"edgerazor_seen_{attention_base(model)}")


def check_attention(model: PreTrainedModel, found: Structure, layers: Collection[int]) -> None:
    """Make sure that losses can make the attention maps of a model: from what is seen, its output must follow.

    Args:
        model: opened; computes a few tokens.
        found: where its layers are.
        layers: those that will be looked at, counted from 1.

    Raises:
        UserError: attention of a layer cannot be seen, or is more than the softmax of queries and keys (sinks, biases).
    """
    family = type(model).__name__
    for layer, problem in _problems(model, found, layers).items():
        raise UserError(f"The attention of layer {layer} of {family} {problem}.", ADVICE)


@torch.no_grad()
def _problems(model: PreTrainedModel, found: Structure, layers: Collection[int]) -> dict[int, str]:
    """What is wrong with layers' attention, from a few tokens: maps made of what was seen must give its output."""
    outputs: dict[int, Tensor] = {}
    ids = torch.arange(1, 6, device=model.device)[None]
    with capture_attention(model, found, layers, ("query", "key", "value"), outputs) as seen:
        model(input_ids=ids, use_cache=False)
    problems = {}
    for layer in sorted(layers):
        if layer not in seen:
            problems[layer] = "cannot be looked at"
        elif not _explains(seen[layer], outputs[layer]):
            problems[layer] = "is not made of queries and keys alone"
    return problems


def _explains(seen: Attention, output: Tensor) -> bool:
    """Whether `softmax(scores) value` is what attention gave, [batch, tokens, heads, d]."""
    assert seen.query is not None
    assert seen.key is not None
    assert seen.value is not None
    groups = seen.query.shape[1] // seen.key.shape[1]
    key, value = (each.float().repeat_interleave(groups, 1) for each in (seen.key, seen.value))
    scores = seen.query.float() @ key.mT * seen.scale
    if seen.cap is not None:
        scores = seen.cap * torch.tanh(scores / seen.cap)
    rows = torch.arange(scores.shape[2], device=scores.device)
    scores = scores.masked_fill(~seen.allowed(0, rows, scores.shape[3]), float("-inf"))
    expected = (torch.softmax(scores, -1) @ value).transpose(1, 2)  # [B, T, heads, d']
    limit = 0.05 if output.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return output.shape == expected.shape and bool((expected - output).norm() <= limit * expected.norm())


@contextlib.contextmanager
def capture_attention(
    model: nn.Module,
    found: Structure,
    layers: Iterable[int],
    parts: Collection[str],
    outputs: dict[int, Tensor] | None = None,
) -> Iterator[dict[int, Attention]]:
    """Fill a mapping with what enters the attention of layers, counted from 1, during forward passes inside.

    With gradient checkpointing (not the reentrant kind) the gradient flows through what was seen: a layer is computed
    again in backward, outside this context, and nothing is seen twice.

    Args:
        model: one that `open_attention` has opened.
        found: where its layers are.
        layers: which to look at.
        parts: what of "query", "key" and "value" is kept; the rest is None.
        outputs: also filled, with the outputs of attention [batch, tokens, heads, head_dim].
    """
    seen: dict[int, Attention] = {}
    blocks: Any = model.get_submodule(found.layers_path)

    def watch(layer: int) -> Callable[[Attention, Tensor], None]:
        def note(attention: Attention, output: Tensor) -> None:
            for part in {"query", "key", "value"} - set(parts):
                setattr(attention, part, None)
            seen[layer] = attention
            if outputs is not None:
                outputs[layer] = output

        return note

    watched = {module: watch(layer) for layer in set(layers) for module in blocks[layer - 1].modules()}
    _watchers.update(watched)
    try:
        yield seen
    finally:
        for module in watched:
            del _watchers[module]


for _base in ("sdpa", "eager"):

    def _seen(*args: Any, base: str = _base, **kwargs: Any) -> Any:
        return attend(base, *args, **kwargs)

    register_attention(f"edgerazor_seen_{_base}", _base, _seen)
