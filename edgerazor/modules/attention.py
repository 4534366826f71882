"""Attention in low bits: rounded keys, values, queries and probabilities, and fewer bits for tokens that matter less.

Keys and values are rounded where they enter attention, which is where the KV cache holds them. Queries are rounded
there, too, and each token's probabilities after the softmax. All of it depends on the token alone, so a KV cache
changes nothing.

*Adaptive tokens* (EdgeQAT, arXiv 2402.10787, section 4.3). In a trained model most attention goes to the first token,
and rounding destroys that. A token's importance in a layer is its mean attention, over heads, to the first token of its
sequence. The less important half of the tokens gets 4-bit activations in the layer's MLP and in the projections (and
queries) of the next layer's attention; all other activations keep their bits. That half is chosen in one of two ways:

- `causal`: by a threshold per layer, the median importance on calibration text. A token's bits are decided when it
  arrives, and later tokens do not change them.
- `ranked`: by rank within the sequence, as published. Later tokens do change it, so it cannot be deployed.

Unlike in the paper, keys and values are not among these activations: they stay in the KV cache, which has one format.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor import formats, models
from edgerazor.errors import UserError
from edgerazor.models.experts import Experts, expert_lists

#: Bits of unimportant tokens' activations, and their share of all tokens, as published.
UNIMPORTANT_BITS, UNIMPORTANT_SHARE = 4, 0.5
#: Names that the families give to the linear layer behind attention.
OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "dense"}


# --- adaptive tokens ---------------------------------------------------------------------------


class ImportantTokens:
    """Which tokens of the current forward pass are important in each layer.

    Args:
        thresholds: the least importance of an important token, by layer; None ranks the tokens of a sequence.

    Attributes:
        importance: layer (from 0) -> float32 [batch, tokens], of the current forward pass.
    """

    def __init__(self, thresholds: tuple[float, ...] | None) -> None:
        self.thresholds = thresholds
        self.importance: dict[int, Tensor] = {}
        self._important: dict[int, Tensor] = {}

    def record(self, layer: int, probabilities: Tensor) -> None:
        """Take a layer's attention probabilities, [batch, heads, tokens, keys], and decide which tokens matter."""
        probabilities = probabilities.detach()
        # Padding on the left comes before the first token; the last token attends to none of it.
        first = (probabilities[:, :, -1].amax(1) > 0).int().argmax(1)  # [batch]
        to_first = probabilities.take_along_dim(first[:, None, None, None], dim=3)  # [batch, heads, tokens, 1]
        importance = to_first.squeeze(3).float().mean(1)  # [batch, tokens]
        if self.thresholds is None:
            least = importance.quantile(UNIMPORTANT_SHARE, dim=1, keepdim=True)
        else:
            least = importance.new_tensor(self.thresholds[layer])
        self.importance[layer] = importance
        self._important[layer] = importance >= least

    def important(self, layer: int) -> Tensor:
        """Which tokens are important in a layer, bool [batch, tokens]."""
        return self._important[layer]


def deciding_layers(model: nn.Module) -> dict[str, int]:
    """Path of each linear layer whose bits depend on the token -> the layer whose attention decides them.

    Raises:
        UserError: the model's attention modules are not known, or its attention forgets the first token.
    """
    layers: dict[str, int] = {}
    for path, attention in _attention_modules(model):
        block = path.rpartition(".")[0]
        projections = {name for name, module in attention.named_modules() if isinstance(module, nn.Linear)}
        if not projections & OUTPUT_PROJECTIONS:
            raise _no_adaptive_tokens(model, f"{path} has no output projection that we know")
        if attention.layer_idx > 0:
            layers |= {f"{path}.{name}": attention.layer_idx - 1 for name in projections - OUTPUT_PROJECTIONS}
        for name, module in model.get_submodule(block).named_modules():
            full_path = f"{block}.{name}"
            if isinstance(module, nn.Linear) and not full_path.startswith(f"{path}."):
                layers[full_path] = attention.layer_idx
    if any(not isinstance(model.get_submodule(listed.path), Experts) for listed in expert_lists(model)):
        raise _no_adaptive_tokens(model, "it does not say which tokens its experts get")
    if not layers:
        raise _no_adaptive_tokens(model, "it has no attention modules that we know")
    config: Any = model.config
    if getattr(config.get_text_config(), "sliding_window", None):
        raise _no_adaptive_tokens(model, "a sliding window forgets the first token")
    return layers


def attach_important_tokens(model: nn.Module, tokens: ImportantTokens) -> None:
    """Let every attention module record its probabilities in `tokens`, once `quantize_attention` was called."""
    for _, attention in _attention_modules(model):
        attention.important_tokens = tokens


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
            yield path, module


def _no_adaptive_tokens(model: nn.Module, reason: str) -> UserError:
    return UserError(
        f"Tokens of {type(model).__name__} cannot have bits of their own, because {reason}.",
        "Give all tokens the same: `calibrate.adaptive_tokens: off`.",
    )


# --- rounding ----------------------------------------------------------------------------------


class _AttentionBits(NamedTuple):
    kv: int
    query: int
    probability: int


def quantize_attention(model: PreTrainedModel, kv_bits: int, query_bits: int = 16, probability_bits: int = 16) -> None:
    """Round keys and values, behind the rotary embedding, per token and head; also queries and probabilities.

    The rounding of a token does not depend on other tokens, so it is the same with and without a KV cache.

    Args:
        model: its configuration is changed, so that it calls the quantized attention.
        kv_bits: bits of keys and values, 4 or 8; 16 leaves them as they are, here and below.
        query_bits: bits of queries, per token and head.
        probability_bits: bits of attention probabilities, per token and head.

    Raises:
        UserError: as `check_attention_bits`.
    """
    records_tokens = any(hasattr(attention, "important_tokens") for _, attention in _attention_modules(model))
    bits = _AttentionBits(kv_bits, query_bits, probability_bits)
    if min(bits) == max(bits) == 16 and not records_tokens:
        return
    check_attention_bits(model, min(bits))
    # Fused attention does not give its probabilities away.
    needs_probabilities = records_tokens or probability_bits != 16
    base = "eager" if needs_probabilities else models.attention_base(model)
    name = f"edgerazor_kv{kv_bits}_{base}"
    if query_bits != 16 or needs_probabilities:
        name = f"edgerazor_kv{kv_bits}_q{query_bits}_p{probability_bits}_{base}"
    models.register_attention(name, base, functools.partial(_quantized_attention, bits=bits, base=base))
    models.set_attention(model, name)


def check_attention_bits(model: PreTrainedModel, bits: int) -> None:
    """Make sure that the inputs of attention can be rounded, so that rounding is never left out quietly.

    Raises:
        UserError: `bits` are not 16, and the model's attention cannot be exchanged for a quantized one.
    """
    if bits != 16 and not models.has_attention_interface(model):
        raise UserError(
            f"The keys and values of {type(model).__name__} cannot be rounded to {bits} bits, because transformers has "
            "no exchangeable attention for it.",
            "Keep them in 16 bits: --kv-bits 16.",
        )


def _quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    bits: _AttentionBits,
    base: str,
    **kwargs: Any,
) -> Any:
    """A function for transformers' `AttentionInterface`; query, key, value: [batch, heads, tokens, head_dim]."""
    tokens: ImportantTokens | None = getattr(module, "important_tokens", None)
    if bits.kv != 16:
        key, value = formats.fake_quantize_kv(key, bits.kv), formats.fake_quantize_kv(value, bits.kv)
    if bits.query != 16:
        query = _quantize_queries(query, bits.query, tokens, getattr(module, "layer_idx", 0))
    output, probabilities = models.attention_forward(base, module, query, key, value, *args, **kwargs)
    if tokens is not None:
        layer: Any = module.layer_idx
        tokens.record(layer, probabilities)
    if bits.probability != 16:
        probabilities = formats.fake_quantize_probabilities(probabilities, bits.probability)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        output = (probabilities @ values).transpose(1, 2).contiguous()  # [batch, tokens, heads, head_dim]
    return output, probabilities


def _quantize_queries(query: Tensor, bits: int, tokens: ImportantTokens | None, layer: int) -> Tensor:
    """Queries [batch, heads, tokens, head_dim], those of unimportant tokens in fewer bits."""
    quantized = formats.fake_quantize_kv(query, bits)
    if tokens is None or layer == 0:
        return quantized
    important = tokens.important(layer - 1)[:, None, :, None]
    return torch.where(important, quantized, formats.fake_quantize_kv(query, min(bits, UNIMPORTANT_BITS)))
