"""Attention in low bits: rounded keys, values, queries and probabilities, and fewer bits for tokens that matter less.

Keys and values are rounded where they enter attention, which is where the cache holds them, queries likewise, and each
token's probabilities after the softmax. All of it depends on the token alone, so a cache changes nothing.

*Important tokens* (EdgeQAT, arXiv 2402.10787, section 4.3). In a trained model most attention goes to the first token,
and rounding destroys that. A token's importance in a layer is its mean attention, over heads, to the first token of its
sequence. The less important half of the tokens gets 4-bit activations in the layer's MLP and in the projections (and
queries) of the next layer's attention; all other activations keep their bits. Two ways to find that half:

- `causal`: by a threshold per layer, the median importance on calibration text. A token's bits are decided when it
  arrives, and later tokens do not change them.
- `ranked`: by rank within the sequence, as published. Later tokens do change it, so it cannot be deployed.

Keys and values are not among them, other than published: they stay in the cache, and a cache has one format.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor import formats, models
from edgerazor.errors import UserError

#: Bits of unimportant tokens' activations, and their share of all tokens, as published.
UNIMPORTANT_BITS, UNIMPORTANT_SHARE = 4, 0.5
#: Names of the linear layer behind attention, in the families.
OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "dense"}


class ImportantTokens:
    """Which tokens of the current forward pass are important in each layer.

    Args:
        thresholds: the least importance of an important token, by layer; None ranks the tokens of a sequence.
    """

    def __init__(self, thresholds: tuple[float, ...] | None) -> None:
        self.thresholds = thresholds
        self.importance: dict[int, Tensor] = {}
        self._important: dict[int, Tensor] = {}

    def see(self, layer: int, probabilities: Tensor) -> None:
        """Note a layer's attention probabilities, [batch, heads, tokens, keys]."""
        seen = probabilities.detach()
        # Padding on the left comes before the first token; the last token attends to none of it.
        first = (seen[:, :, -1].amax(1) > 0).int().argmax(1)  # [batch]
        to_first = seen.take_along_dim(first[:, None, None, None], dim=3)  # [batch, heads, tokens, 1]
        importance = to_first.squeeze(3).float().mean(1)  # [batch, tokens]
        if self.thresholds is None:
            least = importance.quantile(UNIMPORTANT_SHARE, dim=1, keepdim=True)
        else:
            least = importance.new_tensor(self.thresholds[layer])
        self.importance[layer] = importance
        self._important[layer] = importance >= least

    def important(self, layer: int) -> Tensor:
        """bool [batch, tokens]."""
        return self._important[layer]


def decided_by(model: nn.Module) -> dict[str, int]:
    """Path of each linear layer whose activations depend on the token -> the layer whose attention decides.

    Raises:
        UserError: attention is not built as we know it, or forgets the first token.
    """
    found: dict[str, int] = {}
    for path, attention in _attentions(model):
        block = path.rpartition(".")[0]
        inside = {name for name, module in attention.named_modules() if isinstance(module, nn.Linear)}
        if not inside & OUTPUT_PROJECTIONS:
            raise _unknown(model, f"{path} has no output projection that we know")
        if attention.layer_idx > 0:
            found |= {f"{path}.{name}": attention.layer_idx - 1 for name in inside - OUTPUT_PROJECTIONS}
        for name, module in model.get_submodule(block).named_modules():
            full = f"{block}.{name}"
            if isinstance(module, nn.Linear) and not full.startswith(f"{path}."):
                found[full] = attention.layer_idx
    if not found:
        raise _unknown(model, "it has no attention modules that we know")
    if getattr(model.config.get_text_config(), "sliding_window", None):
        raise _unknown(model, "a sliding window forgets the first token")
    return found


def watch_tokens(model: nn.Module, tokens: ImportantTokens) -> None:
    """Let every attention module tell which tokens are important."""
    for _, attention in _attentions(model):
        attention.important_tokens = tokens


def _attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
            yield path, module


def _unknown(model: nn.Module, reason: str) -> UserError:
    return UserError(
        f"Tokens of {type(model).__name__} cannot have bits of their own, because {reason}.",
        "Give all tokens the same: `calibrate.adaptive_tokens: off`.",
    )


# Rounding -----------------------------------------------------------------------------------------------------------


def quantize_cache(model: PreTrainedModel, bits: int, query_bits: int = 16, probability_bits: int = 16) -> None:
    """Round what enters attention, after the rotary embedding: keys and values per token and head.

    The rounding of a token does not depend on other tokens, so it is the same with and without a cache.

    Args:
        model: its configuration is changed.
        bits: of keys and values, 4 or 8; 16 leaves them as they are, and so on.
        query_bits: of queries, per token and head.
        probability_bits: of attention probabilities, per token and head; also lets `ImportantTokens` see them.

    Raises:
        UserError: as `check_cache`.
    """
    watching = any(hasattr(attention, "important_tokens") for _, attention in _attentions(model))
    if bits == query_bits == probability_bits == 16 and not watching:
        return
    check_cache(model, min(bits, query_bits, probability_bits))
    whole = watching or probability_bits != 16
    base = "eager" if whole else models.attention_base(model)
    name = f"edgerazor_kv{bits}_{base}"
    if query_bits != 16 or whole:
        name = f"edgerazor_kv{bits}_q{query_bits}_p{probability_bits}_{base}"
    function = functools.partial(
        _attend, bits=bits, query_bits=query_bits, probability_bits=probability_bits, base=base
    )
    models.register_attention(name, base, function)
    models.use_attention(model, name)


def check_cache(model: PreTrainedModel, bits: int) -> None:
    """Make sure that keys and values can be rounded, so that it is never left out quietly.

    Raises:
        UserError: the model's attention is written so that nothing can be put in front of it.
    """
    if bits != 16 and not models.exchangeable_attention(model):
        raise UserError(
            f"The keys and values of {type(model).__name__} cannot be rounded to {bits} bits, because transformers has "
            "no exchangeable attention for it.",
            "Keep them in 16 bits: --kv-bits 16.",
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    bits: int,
    query_bits: int,
    probability_bits: int,
    base: str,
    **kwargs: Any,
) -> Any:
    """query, key, value: [batch, heads, tokens, head_dim]."""
    tokens: ImportantTokens | None = getattr(module, "important_tokens", None)
    if bits != 16:
        key, value = formats.fake_quantize_kv(key, bits), formats.fake_quantize_kv(value, bits)
    if query_bits != 16:
        query = _rounded_queries(query, query_bits, tokens, getattr(module, "layer_idx", 0))
    output, probabilities = models.attend(base, module, query, key, value, *args, **kwargs)
    if tokens is not None:
        tokens.see(module.layer_idx, probabilities)
    if probability_bits != 16:
        probabilities = formats.fake_quantize_probabilities(probabilities, probability_bits)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        output = (probabilities @ values).transpose(1, 2).contiguous()  # [batch, tokens, heads, head_dim]
    return output, probabilities


def _rounded_queries(query: Tensor, bits: int, tokens: ImportantTokens | None, layer: int) -> Tensor:
    rounded = formats.fake_quantize_kv(query, bits)
    if tokens is None or layer == 0:
        return rounded
    important = tokens.important(layer - 1)[:, None, :, None]
    return torch.where(important, rounded, formats.fake_quantize_kv(query, min(bits, UNIMPORTANT_BITS)))
