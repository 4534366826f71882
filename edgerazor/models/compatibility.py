"""What transformers renamed, under the name that the installed version has for it: no warning reaches a user."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def cache_name(model: nn.Module) -> str:
    """What a model's forward pass and its output call the KV cache.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name works until 5.40, with a warning.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments of a forward pass that goes on from a cache, or makes one where it is None."""
    return {cache_name(model): cache, "use_cache": True}


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model compute activations again in the backward pass instead of keeping them (not the reentrant way).

    transformers 5.24 renamed `gradient_checkpointing_enable` to `activation_checkpointing_enable`.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
