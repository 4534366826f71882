"""What transformers renamed, by the name that the installed version has for it, so that no warning reaches a user."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def cache_name(model: nn.Module) -> str:
    """Name of the KV cache in the arguments of a model's forward pass and in its output.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name works until 5.40, with a warning.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments of a forward pass that continues a KV cache, or begins one where `cache` is None."""
    return {cache_name(model): cache, "use_cache": True}


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable activation (gradient) checkpointing of a model, in place, in the variant that is not reentrant.

    transformers 5.24 renamed `gradient_checkpointing_enable` to `activation_checkpointing_enable`.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
